"""Keys and passwords reach no file and no screen, and a connection that fails says what to do."""

import base64
import json
import ssl

import pytest
from conftest import PROJECT
from loopback import RawEndpoint, completion, http_reply

from fastsae.interpretation.llm import client
from fastsae.runtime import masking
from fastsae.runtime.errors import InputError

KEY = "sk-secret-0123456789"
GOOD = http_reply(completion("mentions bread"))


@pytest.fixture
def server():
    server = RawEndpoint()
    yield server
    server.close()


# What keeps secrets


@pytest.mark.parametrize(
    "key", [KEY, "hunter2", "abc123", "secret", "EMPTY", "sk-1", "k1", "p+q/r=s&t <u>"]
)
def test_an_echoed_key_of_any_length_is_masked(server, tmp_path, key):
    raw = key.encode()
    forms = [
        key,
        f"Bearer {key}",
        base64.b64encode(raw).decode(),
        base64.b64encode(b"user:" + raw).decode(),
        raw.hex(),
        json.dumps(key),
    ]
    for form in forms if len(key) > 4 else forms[:2]:
        endpoint = client.ChatEndpoint(
            key, server.url.replace("//", f"//user:{masking.quote(key, safe='')}@"), "m", timeout=5
        )
        server.behave = http_reply(completion(f"mentions {form} a lot"))
        text, reason, _ = endpoint.complete("x")
        assert (
            reason is None
            and text.startswith("mentions ")
            and text.endswith(" a lot")
            and "***" in text
        ), form
        assert form not in text and key not in text
        server.behave = http_reply({"error": {"message": f"bad key {form}!"}}, "422 No")
        with pytest.raises(client.CallFailed) as caught:
            endpoint.complete("x")
        assert (
            form not in caught.value.reason
            and key not in caught.value.reason
            and "HTTP 422" in caught.value.reason
        )


@pytest.mark.parametrize("key", ["a", "x", "key", "1", "12", "none"])
def test_a_key_like_a_word_spoils_no_text(server, key):
    text = 'mentions a key, 12 boxes and 1 "none" of x, axes'
    server.behave = http_reply(completion(text))
    endpoint = client.ChatEndpoint(key, server.url, "m", timeout=5)
    assert endpoint.complete("x")[0] == text
    if key != "none":
        server.behave = http_reply(completion(f"mentions Bearer {key}."))
        assert endpoint.complete("x")[0] == "mentions Bearer ***."


def test_control_characters_hide_no_key(server):
    server.behave = http_reply(completion(f"mentions {KEY[:9]}\x00{KEY[9:]} and \x1b[31mred"))
    assert (
        client.ChatEndpoint(KEY, server.url, "m", timeout=5).complete("x")[0]
        == "mentions *** and [31mred"
    )


def test_secrets_of_an_address_are_sent_as_wanted_and_masked(server, monkeypatch):
    address = (
        server.url.replace("//", "//me:p%40ssw0rd@") + "?api-version=2024-06-01&api-key=abcdefgh1"
    )
    server.behave = http_reply(
        completion(f"p@ssw0rd {base64.b64encode(b'me:p@ssw0rd').decode()} abcdefgh1 2024-06-01")
    )
    assert (
        client.ChatEndpoint("none", address, "m", timeout=5).complete("x")[0]
        == "*** *** *** 2024-06-01"
    )
    head = server.requests[0][0]
    assert head.startswith(
        "POST /v1/chat/completions?api-version=2024-06-01&api-key=abcdefgh1 HTTP/1.1\r\n"
    )
    assert (
        f"Authorization: Basic {base64.b64encode(b'me:p@ssw0rd').decode()}\r\n" in head
        and "me:" not in head.splitlines()[0]
    )
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    text = masking.of_environment()("Error: p@ssw0rd p%40ssw0rd hunter2 abcdefgh1 at x.py")
    assert text == "Error: *** *** *** *** at x.py"


def test_the_log_of_a_bug_holds_no_secret(outcome, monkeypatch, capsys):
    from fastsae.runtime import errors, storage

    kept = []
    monkeypatch.setattr(storage, "write_text", lambda path, text: kept.append(text))
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{KEY}@host/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "a")

    def main():
        raise RuntimeError(
            f"Basic {base64.b64encode(f'me:{KEY}'.encode()).decode()} {KEY} Bearer a"
        )

    assert outcome(main)[0] == errors.EXIT_BUG
    assert "RuntimeError: Basic *** *** Bearer ***" in kept[0] and "Traceback" in kept[0]


# What says what to do


@pytest.mark.parametrize(
    "key", ["sk-a\nb", "sk-a\rX: y", "sk-ключ", "sk-“quoted”", "sk-a\x00b", "sk-\x7f"]
)
@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "OPENAI_KEY_SAE", "OPENAI_ORG_ID"])
def test_a_key_that_cannot_be_sent_is_one_line(monkeypatch, key, variable):
    monkeypatch.setattr(client.os, "environ", {"OPENAI_API_KEY": KEY, variable: key})
    with pytest.raises(InputError, match=f"^{variable}: .*copy it again") as caught:
        client.endpoint()
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("host", ["a b", "a<b", "a\x7fb", 300 * "ä", "a\\b", "a;b"])
def test_a_host_that_no_host_is_called_is_one_line(monkeypatch, host):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{host}/v1")
    with pytest.raises(InputError, match="^OPENAI_BASE_URL: its host"):
        client.endpoint()


@pytest.mark.parametrize(
    "url, reason, n_tries",
    [
        (
            "http://127.0.0.1:{free}/v1",
            "no connection to 127.0.0.1:{free} (Connection refused). is the server running? "
            "check OPENAI_BASE_URL",
            4,
        ),
        (
            "http://no-such-host.invalid/v1",
            "the host no-such-host.invalid is not found. check OPENAI_BASE_URL and the network",
            4,
        ),
        (
            "https://127.0.0.1:{plain}/v1",
            "TLS fails (wrong version number). check that OPENAI_BASE_URL begins with http",
            4,
        ),
        (
            "https://127.0.0.1:{tls}/v1",
            "the certificate of 127.0.0.1 is not trusted (self-signed certificate). "
            "check OPENAI_BASE_URL, or name "
            "the authority's file in SSL_CERT_FILE",
            1,
        ),
    ],
)
def test_connections_that_fail_say_why(server, tmp_path, url, reason, n_tries, monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    server.behave, secure = http_reply(b"", "400 Bad Request"), RawEndpoint(GOOD, tls=server_tls())
    ports = {
        "free": free_port(),
        "plain": server.server_address[1],
        "tls": secure.server_address[1],
    }
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    try:
        with pytest.raises(client.CallFailed) as caught:
            client.ChatEndpoint(KEY, url.format(**ports), "m", timeout=20).complete("x")
        assert reason.format(**ports) in caught.value.reason and len(waits) == n_tries - 1
        assert caught.value.fatal == (n_tries == 1)
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        trusting = client.ChatEndpoint(KEY, secure.url, "m", timeout=20)
        assert trusting.complete("x")[0] == "mentions bread"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(client.CallFailed, match="SSL_CERT_FILE or SSL_CERT_DIR cannot be read"):
            client.ChatEndpoint(KEY, secure.url, "m", timeout=20).complete("x")
    finally:
        secure.close()


CERTIFICATE = (
    PROJECT / "tests" / "support" / "self_signed.pem"
)  # of 127.0.0.1, with its key; made for these tests


def server_tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_proxies_of_the_environment_are_used(server, monkeypatch):
    server.behave = GOOD
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//u:pass@"))
    backend = client.ChatEndpoint(KEY, "http://far.invalid/v1", "m", timeout=5)
    assert backend.complete("x")[0] == "mentions bread"
    head = server.requests[0][0]
    assert (
        head.startswith("POST http://far.invalid/v1/chat/completions HTTP/1.1\r\n")
        and "\r\nHost: far.invalid\r\n" in head
    )
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'u:pass').decode()}\r\n" in head
    server.behave = b"HTTP/1.1 407 No\r\n\r\n"
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(client.CallFailed, match="the proxy refuses with HTTP 407"):
        client.ChatEndpoint(KEY, "https://far.invalid/v1", "m", timeout=5).complete("x")
    assert (
        server.requests[-1][0].startswith("CONNECT far.invalid:443 HTTP/1.1\r\n")
        and KEY not in server.requests[-1][0]
    )
    monkeypatch.setenv("http_proxy", "socks5://localhost:1")
    with pytest.raises(
        client.CallFailed, match="names cannot be used. name one that begins with http://"
    ):
        backend.complete("x")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert (
        client.ChatEndpoint(KEY, server.url, "m", timeout=5)._answer("x").status == 407
    )  # not through the proxy
