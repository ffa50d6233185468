"""What an endpoint's variables, replies and failures may look like: servers differ, and none of it
costs a call twice."""

import email.utils
import time

import pytest
from conftest import line_of
from loopback import Endpoint, completion

import interpret_sae
from fastsae.interpretation.llm import client
from fastsae.runtime.errors import InputError

KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def server():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def complete(server):
    """Ask an endpoint that gives these replies one prompt: (reply, reason, usage) or the
    CallFailed, and the number of requests."""

    def ask(*replies, timeout=5):
        server.replies[:], server.requests[:] = replies, []
        try:
            return client.ChatEndpoint(KEY, server.url, "m", timeout=timeout).complete("hi"), len(
                server.requests
            )
        except client.CallFailed as error:
            return error, len(server.requests)

    return ask


@pytest.mark.parametrize(
    "reason, valid",
    [
        ("stop", True),
        ("STOP", True),
        ("", True),
        (None, True),
        ("eos_token", True),
        ("end_turn", True),
        ("stop_sequence", True),
        ("length", False),
        ("max_tokens", False),
        ("MAX_TOKENS", False),
        ("content_filter", False),
        ("tool_calls", False),
        ("function_call", False),
    ],
)
def test_only_known_reasons_make_a_reply_unfinished(complete, reason, valid):
    (reply, why, usage), n = complete((200, completion("fruit", reason, usage=(3, 1))))
    assert n == 1 and usage == {"prompt_tokens": 3, "completion_tokens": 1}
    assert (reply, why) == (("fruit", None) if valid else (None, f"unfinished ({reason.lower()})"))


@pytest.mark.parametrize(
    "content, expected",
    [
        ([{"type": "text", "text": "mentions "}, {"type": "text", "text": KEY}], "mentions ***"),
        ([{"text": "fruit"}], "fruit"),
        ([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "fruit"}], "fruit"),
        ([], None),
        ([{"type": "image"}], None),
        ([{"type": "text", "text": None}], None),
        ([1, "x"], None),
        ({"text": "fruit"}, None),
    ],
)
def test_content_in_parts_is_joined(complete, content, expected):
    (reply, why, _), _ = complete((200, completion(content)))
    assert reply == expected and why == (None if expected else "empty")


def test_usage_of_any_type_is_counted(complete):
    for given, expected in (
        ("12", 12),
        (3.5, 3),
        (None, 0),
        ("many", 0),
        (-1, 0),
        ([], 0),
        ("7.5", 0),
    ):
        body = completion("fruit")
        body["usage"] = {"prompt_tokens": given, "completion_tokens": given}
        (reply, _, usage), _ = complete((200, body))
        assert reply == "fruit" and usage == {
            "prompt_tokens": expected,
            "completion_tokens": expected,
        }
    body.pop("usage")
    assert complete((200, body))[0] == ("fruit", None, {"prompt_tokens": 0, "completion_tokens": 0})


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_failures_that_pass_are_tried_again(complete, status, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    assert (
        complete((status, {"error": {"message": "x"}}), (200, completion("fruit")))[0][0] == "fruit"
    )
    error, n = complete((status, {"error": {"message": "x"}}))
    assert f"HTTP {status}" in error.reason and n == 4 and len(waits) == 1 + 3
    assert all(
        low <= wait <= high
        for wait, (low, high) in zip(waits[1:], ((0.375, 0.5), (0.75, 1), (1.5, 2)))
    )


def test_other_failures_are_not_tried_again(complete):
    for status in (400, 401, 422):
        assert complete((status, {"error": {"message": "x"}}))[1] == 1
    assert complete((0, 0.5), timeout=0.1)[1] == 1
    assert complete((503, "x", {"x-should-retry": "false"}))[1] == 1


def test_the_wait_that_a_server_asks_for_is_kept(complete, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    later = email.utils.formatdate(time.time() + 60, usegmt=True)
    for name, value, low, high in (
        ("Retry-After", "7", 7, 7),
        ("Retry-After", later, 57, 60),
        ("retry-after-ms", "1500", 1.5, 1.5),
        ("Retry-After", "soon", 0.375, 0.5),
        ("Retry-After", "0", 0.375, 0.5),
    ):
        waits.clear()
        assert complete((429, {}, {name: value}), (200, completion("fruit")))[0][0] == "fruit"
        assert len(waits) == 1 and low <= waits[0] <= high
    waits.clear()
    assert complete((429, {}, {"Retry-After": "3600"}))[1] == 1 and not waits


@pytest.mark.parametrize("url", ["", " ", "\n"])
def test_an_empty_address_means_the_default_one(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    backend = client.choose_backend("m", timeout=1, device="cpu")
    assert backend.url == "https://api.openai.com/v1/chat/completions" and backend.key == KEY
    assert backend.scope == ["m", None, {}]
    monkeypatch.setenv("OPENAI_API_KEY", "\n")
    assert client.endpoint() is None


def test_spaces_around_key_and_address_are_no_part_of_them(monkeypatch):
    monkeypatch.setenv("OPENAI_KEY_SAE", f"{KEY}\r\n")
    monkeypatch.setenv("OPENAI_BASE_URL", " http://localhost:1/v1\n")
    assert client.endpoint() == (KEY, "http://localhost:1/v1")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "host",
        "http://",
        "http:///v1",
        "//host/v1",
        "http://localhost:80a/v1",
        "http://localhost:99999/v1",
        "http://localhost:0/v1",
        "http://[::1/v1",
        f"http://user:{KEY}@host:x/v1",
        f"user:{KEY}@host/v1",
        KEY,
    ],
)
def test_what_is_no_address_is_one_line_without_secrets(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(InputError) as caught:
        client.choose_backend("m", timeout=1, device="cpu")
    assert (
        str(caught.value).startswith("OPENAI_BASE_URL: ")
        and "\n" not in str(caught.value)
        and KEY not in str(caught.value)
    )


def test_a_wrong_address_ends_the_stage_before_its_work(planted, run_script):
    line = line_of(
        run_script(
            "interpret_sae.py", *planted[2:], env={"OPENAI_BASE_URL": f"http://u:{KEY}@h:80a/v1"}
        ),
        2,
    )
    assert line.startswith("OPENAI_BASE_URL: ") and KEY not in line


def test_a_local_interpreter_uses_the_cache_folder_and_its_own_name(tmp_path, monkeypatch):
    from fastsae.lm import loading

    seen = []

    def remember(name, cache_dir=None):
        seen.append((name, cache_dir))
        raise InputError("MODEL_NAME: x does not exist. give a folder with --model-name.")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "model_source", remember)
        with pytest.raises(InputError, match="^INTERPRETER_MODEL: x .* --interpreter-model local:"):
            client.choose_backend(
                "local:some-model", timeout=1, device="cpu", cache_dir=str(tmp_path)
            ).complete("hi")
    assert seen == [("some-model", str(tmp_path))]
    with pytest.raises(InputError, match="^INTERPRETER_MODEL: /no/such does not exist"):
        client.choose_backend("local:/no/such", timeout=1, device="cpu").complete("hi")


def test_stage_3_hands_the_cache_folder_on(tmp_path, planted, run_main, monkeypatch, capsys):
    def choose_backend(model, **more):
        raise InputError(f"seen: {model} {more['cache_dir']}. done.")

    monkeypatch.setattr(interpret_sae, "choose_backend", choose_backend)
    assert (
        run_main(
            "interpret_sae",
            *planted,
            "--cache-dir",
            tmp_path / "cache",
            "--interpreter-model",
            "local:a",
        )
        == 2
    )
    assert f"seen: local:a {tmp_path / 'cache'}." in capsys.readouterr().err
