"""One HTTP POST, bounded in time and size whatever the server does, that goes to one address only.

No redirect is followed, no cookie is kept, no connection is used twice. What the server sends is
counted on the wire and again when it is unpacked. Each wait for the network ends with the time that
is left for the whole exchange.
"""

import base64
import http.client
import io
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

MAX_BYTES = 2 << 20  # of a reply's body, as sent and as unpacked
MAX_HEADERS = 1 << 18  # bytes of its headers, with those of interim replies
LONGEST_WAIT = 1e6  # seconds; sockets take no larger number
BLOCK = 1 << 16
PLAIN = "/%:@!$&'()*+,;=~"  # characters that stand for themselves in a request's path
CUT_OFF = "the reply breaks off"


class ExchangeFailed(Exception):
    """No reply came. `again`: another try may help. `fatal`: every call would fail alike."""

    def __init__(self, reason: str, *, again: bool = False, fatal: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.again, self.fatal = reason, again, fatal


@dataclass
class Reply:
    """What came. Names in `headers` have small letters; `trouble` says why `body` is not whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    trouble: str = ""


class _TooLong(Exception):
    """The server sent more than is read."""


class _Deadline:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + min(seconds, LONGEST_WAIT)

    def left(self) -> float:
        """Seconds that are left; TimeoutError if there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


class _Wire(io.RawIOBase):
    """The bytes that come from a socket, counted, each wait ending with the deadline."""

    def __init__(self, sock: socket.socket, deadline: _Deadline):
        super().__init__()
        self.sock, self.deadline, self.n_left = sock, deadline, MAX_HEADERS
        self.reader = io.BufferedReader(self, BLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.deadline.left())
        n = self.sock.recv_into(buffer)
        self.n_left -= n
        if self.n_left < 0:
            raise _TooLong
        return n

    def makefile(self, *_):
        """For http.client: always the same reader, whose buffer may hold what comes next."""
        return self.reader

    def send(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            self.sock.settimeout(self.deadline.left())
            rest = rest[self.sock.send(rest) :]


def post(
    url: str, headers: Mapping[str, str], body: bytes, *, seconds: float, tls: ssl.SSLContext | None
) -> Reply:
    """POST `body` to `url`, whose user and password, if any, are sent as Basic authorization.

    `tls` is needed for https. Proxies are those of the environment (HTTP_PROXY, HTTPS_PROXY,
    NO_PROXY). Raises ExchangeFailed if no reply's headers came, or if the exchange as a whole takes
    longer than `seconds`.
    """
    deadline = _Deadline(seconds)
    try:
        return _exchange(url, headers, body, deadline, tls)
    except TimeoutError:
        raise ExchangeFailed("no whole reply within LLM_TIMEOUT") from None
    except _TooLong:
        raise ExchangeFailed(
            f"the reply's headers are longer than {MAX_HEADERS >> 10} KB"
        ) from None
    except ssl.SSLError as error:
        raise _tls_failure(error, urlsplit(url).hostname) from None
    except OSError as error:
        raise ExchangeFailed(
            f"connection lost ({error.strerror or type(error).__name__})", again=True
        ) from None
    except http.client.HTTPException as error:
        raise ExchangeFailed(f"no HTTP reply ({type(error).__name__})") from None


def _exchange(url, headers, body, deadline, tls):
    target = urlsplit(url)
    host = target.hostname
    if not host.isascii():
        host = host.encode("idna").decode()
    port = target.port or {"http": 80, "https": 443}[target.scheme]
    path = quote(target.path or "/", safe=PLAIN)
    if target.query:
        path += "?" + quote(target.query, safe=PLAIN + "?")
    name = f"[{host}]" if ":" in host else host
    authority = name if target.port is None else f"{name}:{port}"
    fields = {
        "Host": authority,
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **_basic(target, "Authorization"),
    }
    fields = {**headers, **fields}
    proxy = _proxy(target.scheme, f"{host}:{port}")
    first = (proxy.hostname, proxy.port or 80) if proxy else (host, port)
    sock = _connected(*first, deadline)
    with sock:
        if target.scheme == "https":
            if proxy:
                _open_tunnel(_Wire(sock, deadline), f"{name}:{port}", proxy)
            sock.settimeout(deadline.left())
            sock = tls.wrap_socket(sock, server_hostname=host)
        elif proxy:
            path = f"http://{authority}{path}"
            fields |= _basic(proxy, "Proxy-Authorization")
        with sock:
            wire = _Wire(sock, deadline)
            try:
                wire.send(_head("POST", path, fields) + body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server may answer before it has read everything
            return _read(wire)


def _head(method, target, fields):
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {fields[name]}" for name in fields)]
    return "\r\n".join([*lines, "\r\n"]).encode("ascii")


def _basic(parts, name):
    """The header with user and password of an address, if it has any."""
    if parts.username is None and parts.password is None:
        return {}
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return {name: f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _read(wire):
    """The reply on the wire; interim ones (1xx) are passed over."""
    while True:
        answer = http.client.HTTPResponse(wire, method="POST")
        answer.begin()
        if not 100 <= answer.status < 200 or answer.status == 101:
            break
        # or its end would close what the next one reads
        answer.fp = None  # type: ignore[assignment]
    # of equal ones the first
    headers = {name.lower(): value for name, value in reversed(answer.getheaders())}
    blocks, trouble, wire.n_left = [], "", MAX_BYTES
    try:
        while block := answer.read(BLOCK):
            blocks.append(block)
        if answer.length:
            trouble = CUT_OFF
    except TimeoutError:
        raise
    except _TooLong:
        trouble = f"the reply is longer than {MAX_BYTES >> 20} MB"
    except (OSError, http.client.HTTPException, ValueError):
        trouble = CUT_OFF
    body = b"".join(blocks)
    packed = headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        body, why = _unpacked(body, packed)
        trouble = trouble or why
    return Reply(answer.status, headers, body, trouble)


def _unpacked(body, packed):
    """(the body as far as it can be had, why it is not whole or "").

    Some servers pack without being asked to.
    """
    bits = {
        "gzip": 16 + zlib.MAX_WBITS,
        "x-gzip": 16 + zlib.MAX_WBITS,
        "deflate": zlib.MAX_WBITS,
    }.get(packed)
    if bits is None:
        return b"", f"the reply is packed as {packed[:20]!a}, which was not asked for"
    try:
        unpacker = zlib.decompressobj(bits)
        content = unpacker.decompress(body, MAX_BYTES)
    except zlib.error:
        return b"", f"the reply is not packed as {packed}, as its header says"
    if unpacker.unconsumed_tail:
        return content, f"the reply is longer than {MAX_BYTES >> 20} MB"
    return content, "" if unpacker.eof else CUT_OFF


def _connected(host, port, deadline):
    """A socket connected to one of the host's addresses, which share the time that is left."""
    addresses, problem = _addresses(host, port, deadline), OSError()
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.left() / (len(addresses) - i))
            sock.connect(address)
            return sock
        except OSError as error:  # a time-out too
            sock.close()
            problem = error
    deadline.left()  # the time-out of the whole has its own message
    raise ExchangeFailed(
        f"no connection to {_shown(host)}:{port} ({problem.strerror or 'no answer'}). "
        "is the server running? "
        "check OPENAI_BASE_URL",
        again=True,
    )


def _addresses(host, port, deadline):
    """What getaddrinfo says; asked in a thread, for it takes its own time."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask():
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=deadline.left())
    except queue.Empty:
        found = TimeoutError()
    if isinstance(found, Exception):
        raise ExchangeFailed(
            f"the host {_shown(host)} is not found. check OPENAI_BASE_URL and the network",
            again=True,
        )
    return found


def _shown(host):
    return ascii(host)[1:-1][:60]


def _proxy(scheme, host):
    """The proxy that the environment names for the host, as parts of an address, or None."""
    proxies = urllib.request.getproxies()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        usable = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ExchangeFailed(
            f"the proxy that {scheme.upper()}_PROXY or ALL_PROXY names cannot be used. "
            "name one that begins with "
            "http://, or add the host to NO_PROXY",
            fatal=True,
        )
    return parts


def _open_tunnel(wire, authority, proxy):
    wire.send(
        _head("CONNECT", authority, {"Host": authority, **_basic(proxy, "Proxy-Authorization")})
    )
    answer = http.client.HTTPResponse(wire, method="CONNECT")
    answer.begin()
    if answer.status != 200:
        raise ExchangeFailed(
            f"the proxy refuses with HTTP {answer.status}. "
            "check HTTPS_PROXY, or add the host to NO_PROXY",
            again=500 <= answer.status < 600,
        )


def tls_context() -> ssl.SSLContext:
    """Trusts SSL_CERT_FILE or SSL_CERT_DIR if set, else certifi's list, else the system's."""
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return _own_authorities()
    try:
        import certifi
    except ImportError:
        return ssl.create_default_context()
    return ssl.create_default_context(cafile=certifi.where())


def _own_authorities():
    try:
        return ssl.create_default_context(
            cafile=os.environ.get("SSL_CERT_FILE") or None,
            capath=os.environ.get("SSL_CERT_DIR") or None,
        )
    except OSError as error:
        raise ExchangeFailed(
            f"SSL_CERT_FILE or SSL_CERT_DIR cannot be read "
            f"({error.strerror or 'no certificates'}). correct or "
            "unset it",
            fatal=True,
        ) from None


def _tls_failure(error, host):
    if isinstance(error, ssl.SSLCertVerificationError):
        return ExchangeFailed(
            f"the certificate of {_shown(host)} is not trusted ({error.verify_message}). "
            "check OPENAI_BASE_URL, or "
            "name the authority's file in SSL_CERT_FILE",
            fatal=True,
        )
    reason = re.sub(r"[^A-Z ]", " ", (error.reason or type(error).__name__).upper()).lower()
    return ExchangeFailed(
        f"TLS fails ({reason}). "
        "check that OPENAI_BASE_URL begins with http or https as the server wants",
        again=True,
    )
