"""Chat endpoints on loopback: those of the experiments, and one that sends any bytes it likes."""

import json
import re
import socket
import socketserver
import threading

from experiments.shared.loopback import Endpoint, RealModel, completion

__all__ = ["Endpoint", "RawEndpoint", "RealModel", "completion", "http_reply"]


class RawEndpoint(socketserver.ThreadingTCPServer):
    """Reads one request of a connection, then sends what `behave` is, or calls it with the socket.

    `requests` holds (first line and headers, body) of each.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, behave=b"", tls=None):
        super().__init__(("127.0.0.1", 0), RawHandler)
        self.behave, self.tls, self.requests = behave, tls, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):  # clients that had enough
        pass


class RawHandler(socketserver.BaseRequestHandler):
    def handle(self):
        sock, tls = self.request, self.server.tls
        sock = tls.wrap_socket(sock, server_side=True) if tls else sock
        with sock, sock.makefile("rb") as file:
            if not tls and sock.recv(1, socket.MSG_PEEK) == b"\x16":  # TLS on a plain port
                return sock.sendall(http_reply(b"", "400 Bad Request"))
            lines = list(iter(file.readline, b"\r\n"))
            if not lines[0]:
                return
            head = b"".join(lines)
            length = re.search(rb"content-length: (\d+)", head, re.I)
            self.server.requests.append((head.decode(), file.read(int(length[1]) if length else 0)))
            behave = self.server.behave
            if isinstance(behave, bytes):
                sock.sendall(behave)
            else:
                behave(sock)


def http_reply(body, status="200 OK", *headers, kind="application/json", length=None):
    """The bytes of an HTTP reply: `body` is bytes, or JSON of anything else."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1") + body
