"""Whatever an endpoint sends: a label or a status, within bounds, nowhere else, paid for once."""

import gzip
import json
import random
import socket
import time
import zlib

import pytest
from loopback import RawEndpoint, completion, http_reply

from fastsae.interpretation.llm import bounded_http, client, replies
from fastsae.runtime.errors import InputError

KEY = "sk-secret-0123456789"
GOOD = http_reply(completion("mentions bread"))
TEXT = b'{"choices":[{"finish_reason":"stop","message":{"role":"assistant","content":"%s"}}]%s}'
LONG = b"a" * (bounded_http.MAX_BYTES + 200_000)
TOO_LONG, TOO_DEEP = "the reply is longer than 2 MB", "the reply's JSON is nested too deeply"
NO_COMPLETION, NO_JSON, CUT_OFF = (
    "the reply is not a chat completion",
    "the reply is not JSON",
    "the reply breaks off",
)
LATE = "no whole reply within LLM_TIMEOUT"


def content(text, more=b""):
    return http_reply(TEXT % (text, more))


def packed(body, name):
    return http_reply(body, "200 OK", f"Content-Encoding: {name}")


def chunked(body, end=b"0\r\n\r\n", size=None):
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + (size or b"%x" % len(body)) + b"\r\n" + body + b"\r\n" + end


def slowly(start, piece, n=60):
    """Sends `piece` fifty times a second, for longer than the time-out of these tests."""

    def behave(sock):
        sock.sendall(start)
        for _ in range(n):
            sock.sendall(piece)
            time.sleep(0.02)

    return behave


def flood(start, piece):
    """Sends far more than anyone should read; ends by itself."""

    def behave(sock):
        sock.sendall(start)
        for _ in range(200):
            sock.sendall(piece * (100_000 // len(piece)))

    return behave


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BODY = GOOD.partition(b"\r\n\r\n")[2]
PLAIN = HEAD + b"Content-Length: %d\r\n" % len(BODY)

USED = {  # the reply's text is used
    "good": GOOD,
    "a lone surrogate": content(b"mentions \\ud800 bread"),
    "control characters": content(b"mentions \\u001b[31m\\u0000red"),
    "raw control characters": content(b"mentions \x00\x1b red"),
    "no UTF-8": content(b"mentions \xff\xfe bread"),
    "charset=hex": http_reply(BODY, kind="application/json; charset=hex"),
    "a BOM": http_reply(b"\xef\xbb\xbf" + BODY),
    "usage of 4,299 digits": content(
        b"mentions x", b',"usage":{"prompt_tokens":%s}' % (b"9" * 4299)
    ),
    "usage of 50,000 digits": content(
        b"mentions x", b',"usage":{"prompt_tokens":%s}' % (b"9" * 50_000)
    ),
    "usage infinite": content(
        b"mentions x", b',"usage":{"prompt_tokens":Infinity,"completion_tokens":NaN}'
    ),
    "usage a list": content(b"mentions x", b',"usage":[1]'),
    "usage negative": content(b"mentions x", b',"usage":{"prompt_tokens":-5}'),
    "a finish_reason of another type": http_reply(completion("mentions bread", finish_reason=True)),
    "duplicate keys": http_reply(b'{"choices":5,' + BODY[1:]),
    "100,000 choices": http_reply(
        json.dumps({"choices": completion("mentions bread")["choices"] + [1] * 100_000}).encode()
    ),
    "gzip": packed(gzip.compress(BODY), "gzip"),
    "deflate": packed(zlib.compress(BODY), "deflate"),
    "chunks": chunked(BODY),
    "trailers": chunked(BODY, b"0\r\nX-A: 1\r\n\r\n"),
    "100 and 103 before": b"HTTP/1.1 100 Continue\r\n\r\n"
    + b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    + GOOD,
    "no length": HEAD + b"\r\n" + BODY,
    "more bytes than said": GOOD + b"HTTP/1.1 200 OK\r\n\r\npoison",
    "fewer bytes than said": HEAD + b"Content-Length: 99999\r\n\r\n" + BODY,
    "cookies": PLAIN + b"Set-Cookie: a=b\r\n" * 50 + b"\r\n" + BODY,
    "HTTP/1.0": GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "status 299": GOOD.replace(b"200 OK", b"299 Odd"),
    "NaN": content(b"mentions x", b',"created":NaN'),
    "a length of 5,000 digits": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + BODY,
}

UNUSABLE = {  # paid for, and kept as what cannot be used: no second payment
    "nested JSON": (http_reply(b"[" * 200_000), TOO_DEEP),
    "a nested field": (content(b"x", b',"y":' + b"[" * 99_000 + b"]" * 99_000), TOO_DEEP),
    "a long body": (content(LONG), TOO_LONG),
    "a bomb": (packed(gzip.compress(TEXT % (b"a" * 50_000_000, b""), 1), "gzip"), TOO_LONG),
    "an endless body": (flood(HEAD + b"\r\n", b" "), TOO_LONG),
    "endless chunks": (flood(chunked(b"x", b""), b"1\r\nx\r\n"), TOO_LONG),
    "endless trailers": (flood(chunked(BODY, b"0\r\n"), b"X: y\r\n"), TOO_LONG),
    "a length of 10 ** 18": (
        flood(HEAD + b"Content-Length: 1" + b"0" * 18 + b"\r\n\r\n", b" "),
        TOO_LONG,
    ),
    "a long text": (content(b"a" * 300_000), "longer than 200,000 characters"),
    "no gzip": (packed(BODY, "gzip"), "not packed as gzip"),
    "brotli": (packed(b"x", "br"), "'br'"),
    "zstd": (packed(b"x", "zstd"), "'zstd'"),
    "nested gzip": (packed(gzip.compress(gzip.compress(BODY)), "gzip, gzip"), "'gzip, gzip'"),
    "an encoding with an escape": (packed(b"x", "\x1b[2J"), r"'\x1b[2j'"),
    "events": (http_reply(b'data: {"choices":[]}\n\n', kind="text/event-stream"), NO_JSON),
    "half JSON": (http_reply(BODY[:-9]), NO_JSON),
    "tokens without a choice": (
        http_reply({"choices": [], "usage": {"completion_tokens": 5}}),
        NO_COMPLETION,
    ),
    "choices an object": (http_reply({"choices": {"x": 1}}), NO_COMPLETION),
    "choices a text": (http_reply({"choices": "abc"}), NO_COMPLETION),
    "choices of numbers": (http_reply({"choices": [5]}), NO_COMPLETION),
    "a message that is text": (http_reply({"choices": [{"message": "hello"}]}), NO_COMPLETION),
    "null content": (http_reply(completion(None)), "empty"),
    "a refusal": (http_reply(completion("no", refusal="no")), "refused"),
}

FAILED = {  # no reply: asked again by the next run, not by this one
    "an error of status 200": (
        http_reply({"error": {"message": "no \u001b credit"}}),
        "the reply is an error: no credit",
    ),
    "no choices": (http_reply({"choices": []}), NO_COMPLETION),
    "a list": (http_reply([1]), NO_COMPLETION),
    "a page": (http_reply(b"<html>", kind="text/html; charset=hex"), NO_JSON),
    "nothing": (http_reply(b""), "the reply is empty"),
    "204 with a body": (GOOD.replace(b"200 OK", b"204 No Content"), "the reply is empty"),
    "a body that breaks off": (http_reply(BODY[:40], length=5000), CUT_OFF),
    "chunks that break off": (chunked(b"", b"", b"ff"), CUT_OFF),
    "a chunk of negative size": (chunked(b"x", size=b"-5"), CUT_OFF),
    "a chunk of no size": (chunked(b"x", size=b"zz"), CUT_OFF),
    "gzip that breaks off": (packed(gzip.compress(BODY)[:-20], "gzip"), CUT_OFF),
    "dripping": (slowly(PLAIN + b"\r\n", b" "), LATE),
    "dripping headers": (slowly(b"HTTP/1.1 200 OK\r\nX: ", b"a"), LATE),
    "dripping interim replies": (slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), LATE),
    "dripping chunks": (slowly(chunked(b"x", b""), b"1\r\nx\r\n"), LATE),
    "dripping errors": (slowly(b"HTTP/1.1 503 Busy\r\nContent-Length: 9999\r\n\r\n", b"a"), LATE),
    "interim replies": (flood(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), "headers are longer"),
    "a long header": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", "LineTooLong"),
    "1,000 headers": (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1000 + b"\r\n", "no HTTP reply"),
    "HTTP/0.9": (b"hello\r\n", "no HTTP reply"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no HTTP reply"),
    "bytes": (bytes(range(256)) * 9, "no HTTP reply"),
    "status 600": (GOOD.replace(b"200 OK", b"600 Odd"), "HTTP 600"),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", "HTTP 101"),
    "an error with a surrogate": (
        http_reply(b'{"error":{"message":"bad \\ud800 thing"}}', "422 No"),
        "HTTP 422 bad \ufffd thing",
    ),
    "an error with escapes": (
        http_reply({"error": {"message": "\x1b]0;x\x07\x1b[2J\rEVIL"}}, "422 No"),
        "HTTP 422 ]0;x[2J EVIL",
    ),
    "an error of charset=hex": (
        http_reply(b"zz", "422 No", kind="text/html; charset=hex"),
        "HTTP 422 zz",
    ),
    "an error of nested JSON": (http_reply(b"[" * 200_000, "422 No"), "HTTP 422 [[["),
    "an error as text": (http_reply("a string", "422 No"), "HTTP 422 a string"),
    "an error as list": (http_reply([1, 2], "422 No"), "HTTP 422 [1, 2]"),
    "a long error": (flood(b"HTTP/1.1 422 No\r\n\r\n", b"a"), "HTTP 422 aaa"),
    **{
        f"Retry-After {value}": (http_reply(b"{}", "429 Busy", f"Retry-After: {value}"), "HTTP 429")
        for value in ("inf", "1e308", "1e999", "Fri, 31 Dec 9999 23:59:59 GMT", "9" * 5000)
    },
}


@pytest.fixture
def server():
    server = RawEndpoint()
    yield server
    server.close()


def asker(server, path, timeout=20, **more):
    return client.Asker(
        client.ChatEndpoint(KEY, server.url, "m", timeout=timeout), path, n_workers=2, **more
    )


def ask(server, path, behave, prompts=("one", "two"), **more):
    """{prompt: (reply, reason)} of one run against the endpoint, and its number of requests."""
    server.behave, before = behave, len(server.requests)
    found = asker(server, path, **more).ask(list(prompts), "labels")
    return found, len(server.requests) - before


def harmless(text):
    return all(c.isprintable() or c == "\n" for c in text) and not any(
        "\ud800" <= c <= "\udfff" for c in text
    )


@pytest.mark.parametrize("mode", USED)
def test_odd_replies_are_used(server, tmp_path, mode, tally):
    found, n = ask(server, tmp_path / "j.jsonl", USED[mode])
    assert n == 2 and all(
        reply.startswith("mentions") and reason is None and harmless(reply)
        for reply, reason in found.values()
    )
    assert ask(server, tmp_path / "j.jsonl", GOOD) == (found, 0)
    tally("hostile replies survived", 1)


@pytest.mark.parametrize("mode", UNUSABLE)
def test_what_was_paid_for_and_cannot_be_used_is_not_bought_again(server, tmp_path, mode, tally):
    behave, reason = UNUSABLE[mode]
    found, n = ask(server, tmp_path / "j.jsonl", behave)
    assert n == 2 and all(
        reply is None and reason in why and harmless(why) for reply, why in found.values()
    ), found
    assert (tmp_path / "j.jsonl").stat().st_size < 1000
    assert ask(server, tmp_path / "j.jsonl", GOOD) == (found, 0)
    assert ask(server, tmp_path / "j.jsonl", GOOD, retry_unusable=True)[1] == 2
    tally("hostile replies survived", 1)


@pytest.mark.parametrize("mode", FAILED)
def test_what_is_no_reply_is_a_status_and_asked_once(server, tmp_path, mode, tally):
    behave, reason = FAILED[mode]
    found, n = ask(server, tmp_path / "j.jsonl", behave, timeout=0.4 if reason == LATE else 20)
    assert n == 2 and all(
        reply is None and reason in why and harmless(why) and len(why) < 120
        for reply, why in found.values()
    ), found
    assert not (tmp_path / "j.jsonl").exists()
    found, n = ask(server, tmp_path / "j.jsonl", GOOD)
    assert n == 2 and {reply for reply, _ in found.values()} == {"mentions bread"}
    tally("hostile replies survived", 1)


@pytest.mark.parametrize(
    "wait", ["nan", "-5", "0", "soon", "1_0e-4", "", "Thu, 01 Jan 1970 00:00:00 GMT", "\xff"]
)
def test_waits_that_mean_nothing_are_short(server, tmp_path, wait, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    assert (
        ask(
            server,
            tmp_path / "j.jsonl",
            http_reply(b"{}", "429 Busy", f"Retry-After: {wait}"),
            ["one"],
        )[1]
        == 4
    )
    assert len(waits) == 3 and all(0 < seconds <= 2 for seconds in waits)


def test_waits_of_a_call_are_bounded_in_all(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    assert (
        ask(
            server, tmp_path / "j.jsonl", http_reply(b"{}", "429 Busy", "Retry-After: 50"), ["one"]
        )[1]
        == 3
    )
    assert waits == [50, 50]


def test_the_requests_of_a_call_share_its_time(server, tmp_path, monkeypatch):
    """Each failure that passes takes 0.2 s of 0.5: the third is not waited for."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)

    def busy(sock):
        time.sleep(0.2)
        sock.sendall(http_reply(b"{}", "503 Busy"))

    found, n = ask(server, tmp_path / "j.jsonl", busy, ["one"], timeout=0.5)
    assert n <= 3 and found["one"][1] in (f"failed: {LATE}", "failed: HTTP 503 {}")


def test_a_slow_resolver_and_a_server_that_reads_nothing_take_no_longer(monkeypatch):
    """Both would go on for 3 s."""
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
    with silent, pytest.raises(client.CallFailed, match=LATE):
        client.ChatEndpoint(KEY, url, "m", timeout=0.2).complete("x" * 20_000_000)
    resolve = socket.getaddrinfo

    def slowly_resolve(*args, **more):
        time.sleep(3)
        return resolve(*args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slowly_resolve)
    started = time.monotonic()
    with pytest.raises(client.CallFailed, match="127.0.0.1 is not found"):
        client.ChatEndpoint(KEY, url, "m", timeout=0.2).complete("x")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 300, 304])
def test_no_redirect_is_followed(server, tmp_path, status):
    other = RawEndpoint(GOOD)
    try:
        for place in (
            f"http://user:{KEY}@{other.url[7:]}?k={KEY}",
            "/v2",
            "file:///etc/passwd",
            "http://[",
            "",
            "\x1b[2J",
            "//x",
        ):
            redirect = http_reply(b"", f"{status} Moved", f"Location: {place}")
            found, n = ask(
                server, tmp_path / f"{len(place)}.jsonl", redirect, [str(i) for i in range(9)]
            )
            assert n <= 2  # the calls in flight
            assert all(
                f"HTTP {status}: the server sends its clients to" in why
                and "OPENAI_BASE_URL" in why
                and harmless(why)
                and KEY not in why
                for _, why in found.values()
            )
        assert not other.requests
    finally:
        other.close()


def test_an_unexpected_exception_costs_one_call_and_is_named(server, tmp_path, monkeypatch):
    endpoint = client.ChatEndpoint(KEY, server.url, "m", timeout=5)
    server.behave = GOOD
    whole = endpoint.complete

    def complete(prompt):
        return whole(prompt) if prompt == "two" else {}["no such"]

    monkeypatch.setattr(endpoint, "complete", complete)
    found = client.Asker(endpoint, tmp_path / "j.jsonl", n_workers=1).ask(["one", "two"], "labels")
    assert found["two"] == ("mentions bread", None)
    assert (
        found["one"][0] is None
        and "a bug, KeyError at test_hostile_endpoint.py:" in found["one"][1]
    )
    monkeypatch.setattr(
        endpoint, "complete", lambda prompt: (_ for _ in ()).throw(InputError("X: bad. repair it."))
    )
    with pytest.raises(InputError):
        client.Asker(endpoint, tmp_path / "j.jsonl", n_workers=1).ask(["three"], "labels")


# The journal

DAMAGE = [
    b"[" * 100_000,
    b'{"key":' * 50_000,
    b"5",
    b"null",
    b'{"key": 5, "reply": "x"}',
    b'{"key": ["a"], "reply": "x"}',
    b'{"reply": "x"}',
    b'{"key": "K", "reply": 5}',
    b'{"key": "K", "reply": {"a": 1}}',
    b'{"key": "K", "reply": "x", "unusable": 7}',
    b"\xff\xfe\x00",
    b'{"key": "K", "reply": "x", "n": ' + b"9" * 5000 + b"}",
    b'{"key": "K"',
    b"x" * 1_000_000,
    b'{"version": 9}',
]


def test_a_damaged_journal_loses_no_good_line(tmp_path, tally):
    scope = ["m", None, {}]
    for i, damage in enumerate(DAMAGE):
        path = tmp_path / f"{i}.jsonl"
        journal = client.Journal(path, scope)
        journal.add("p1", "r1")
        with open(path, "ab") as file:
            file.write(damage.replace(b'"K"', json.dumps(journal.key("p3")).encode()) + b"\n")
        journal.add("p2", None, "empty")
        again = client.Journal(path, scope)
        assert again.get("p1")["reply"] == "r1" and again.get("p2")["unusable"] == "empty"
        assert again.get("p3") is None, damage[:60]
        again.add("p3", "r3")
        assert client.Journal(path, scope).get("p3")["reply"] == "r3"
    tally("damaged journals read", len(DAMAGE))


def test_what_a_journal_says_is_cleaned_too(tmp_path, monkeypatch):
    from fastsae.runtime import storage

    path, scope = tmp_path / "j.jsonl", ["m", None, {}]
    key = client.Journal(path, scope).key("p")
    path.write_text(
        json.dumps({"key": key, "reply": "a \ud800\x1b[2Jb\rc", "unusable": "x\ny"}) + "\n"
    )
    assert client.Journal(path, scope).get("p") == {
        "key": key,
        "reply": "a \ufffd[2Jb\nc",
        "unusable": "x y",
    }
    monkeypatch.setattr(storage, "MAX_LINE", 100)
    path.write_text(
        json.dumps({"key": "long", "reply": "a" * 1000})
        + "\n"
        + json.dumps({"key": key, "reply": "b"})
    )
    assert list(client.Journal(path, scope).replies) == [key]


# Texts


def test_texts_are_cleaned():
    assert (
        replies.cleaned("a\tb\nc") == "a\tb\nc"
        and replies.cleaned("größe 日本 👩‍🚀 می‌خواهم") == "größe 日本 👩‍🚀 می‌خواهم"
    )
    assert replies.cleaned("a\r\nb\rc\u2028d\x85e\x0bf") == "a\nb\nc\nd\ne f"
    hidden = "\x00\x07\x1b\x7f\x9b\u200b\u200e\u202e\u2066\ufeff\ufffe\U000e0041\xad"
    assert replies.cleaned(f"a{hidden}b\udc80") == "ab\ufffd"
    everything = "".join(map(chr, range(0x3000)))
    assert replies.cleaned(replies.cleaned(everything)) == replies.cleaned(everything)


def test_no_reply_breaks_its_reading(tally):
    """Mutated completions and answers: a text, a reason, or NoCompletion, and nothing else."""
    chance, whole = (
        random.Random(0),
        TEXT
        % (
            b"My final verdict score is: [[4]], feature name is [[words]]",
            b',"usage":{"prompt_tokens":5}',
        ),
    )
    pieces = [
        b"[[",
        b"]]",
        b'"',
        b"\\ud800",
        b"\\",
        b"{",
        b"[",
        b"null",
        b"\xff",
        b"<think>",
        b"</think>",
        b"\n",
        b"1e999",
        b"yes",
        b"",
    ]
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            body[at : at + chance.choice((0, 1, 8))] = chance.choice(pieces)
        try:
            text, reason, usage = replies.read_completion(bytes(body), "application/json")
        except replies.NoCompletion:
            continue
        assert (text is None) != (reason is None) and all(
            isinstance(n, int) and n >= 0 for n in usage.values()
        )
        for parse in (replies.parse_label, replies.parse_fast, replies.parse_yes_no):
            parse(text or "")
    tally("mutated completions read", 3000)
