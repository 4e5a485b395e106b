"""A small read-only server for a report folder: this machine only, unless another address is asked for.

It speaks just enough HTTP for a browser to read flat files: one request per connection, no state, nothing to write.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import socketserver
import stat
import sys
import threading
import time
import webbrowser
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

REQUEST_LINE: Final = 8_192
"""Longest request line in bytes."""
HEADERS: Final = 16_384
"""Longest request line and headers together in bytes."""
HEADER_SECONDS: Final = 5.0
"""A client that has not sent its headers by then is disconnected."""
SEND_SECONDS: Final = 30.0
CONNECTIONS: Final = 32
"""Most connections at a time; beyond it the one that has been silent longest makes room."""

TYPES: Final = {".html": "text/html; charset=utf-8", ".md": "text/plain; charset=utf-8"}
_NAME: Final = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")
_POLICY: Final = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'"
_FIXED: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Content-Security-Policy", _POLICY),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
)


@dataclass(frozen=True)
class _Reply:
    status: HTTPStatus
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    head_only: bool = False


class _Refused(Exception):
    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class ReportServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves the flat files of one folder.

    Args:
        folder: the report folder.
        host: address to listen on; ``localhost`` means 127.0.0.1.
        port: port, 0 takes a free one.

    Raises:
        ValueError: if ``host`` is no address, ``port`` is out of range or ``folder`` holds no report.
        OSError: if the address cannot be used.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"
    request_queue_size = 128

    def __init__(self, folder: str | Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = Path(folder).resolve()
        if not (self.folder / "index.html").is_file():
            raise ValueError(
                f"folder must hold a report, got {str(folder)!r}. Write one with `pullback report`."
            )
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"port must be 0 to 65535, got {port!r}. Use 0 for any free port.")
        self.address = _address(host)
        self.token = "" if self.address.is_loopback else secrets.token_urlsafe(24)
        self.address_family = socket.AF_INET6 if self.address.version == 6 else socket.AF_INET
        self._waiting: OrderedDict[socket.socket, float] = OrderedDict()
        self._open = 0
        self._guard = threading.Lock()
        try:
            super().__init__((str(self.address), port), _Handler)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port."
            ) from error

    @property
    def url(self) -> str:
        """Address of the index page, with the token where one is needed."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"http://{host}:{self.server_address[1]}/" + (f"{self.token}/" if self.token else "")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make room for the new connection, or refuse it when every place is busy sending."""
        with self._guard:
            if self._open >= CONNECTIONS and self._waiting:
                oldest, _ = self._waiting.popitem(last=False)
                self._open -= 1
                with contextlib.suppress(OSError):  # it may have gone by itself meanwhile
                    oldest.shutdown(socket.SHUT_RDWR)
            full = self._open >= CONNECTIONS
            if not full:
                self._open += 1
                self._waiting[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def heard(self, request: socket.socket) -> bool:
        """Note that a client has sent its request; False when it was disconnected to make room."""
        with self._guard:
            return self._waiting.pop(request, None) is not None

    def done(self, *, counted: bool) -> None:
        """Free the place of a connection that was still counted."""
        if counted:
            with self._guard:
                self._open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event; anything else is printed as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(socketserver.BaseRequestHandler):
    server: ReportServer  # ty: ignore[incompatible-mutable-override] (the base class leaves it open)
    request: socket.socket

    def handle(self) -> None:
        counted = True
        try:
            try:
                head = _read_head(self.request)
            finally:
                counted = self.server.heard(self.request)
            if not counted or head is None:
                return
            self._send(answer(self.server, head))
        except _Refused as refused:
            self._send(_Reply(refused.status, refused.status.phrase.encode() + b"\n"))
        finally:
            self.server.done(counted=counted)

    def _send(self, reply: _Reply) -> None:
        lines = [
            f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
            f"Content-Type: {reply.kind}",
            f"Content-Length: {len(reply.body)}",
            *(f"{name}: {value}" for name, value in _FIXED),
        ]
        if reply.status == HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
        self.request.settimeout(SEND_SECONDS)
        self.request.sendall(head if reply.head_only else head + reply.body)


def _read_head(connection: socket.socket) -> bytes | None:
    """Read up to the blank line within the time and size allowed; None when the client left."""
    deadline = time.monotonic() + HEADER_SECONDS
    data = b""
    while b"\r\n\r\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT)
        connection.settimeout(left)
        try:
            piece = connection.recv(4_096)
        except TimeoutError as error:
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT) from error
        if not piece:
            return None
        data += piece
        if b"\r\n" not in data[: REQUEST_LINE + 2] and len(data) > REQUEST_LINE:
            raise _Refused(HTTPStatus.REQUEST_URI_TOO_LONG)
        if len(data) > HEADERS:
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    return data.split(b"\r\n\r\n", 1)[0]


def answer(server: ReportServer, head: bytes) -> _Reply:
    """Answer one request.

    Args:
        server: whose folder, address and token hold.
        head: request line and headers, without the blank line.

    Returns:
        The reply.

    Raises:
        _Refused: with the status that says why.
    """
    line, *fields = head.split(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not re.fullmatch(rb"HTTP/1\.[01]", parts[2]):
        raise _Refused(HTTPStatus.BAD_REQUEST)
    method, target, _ = parts
    _check_host(server, fields)
    if method not in (b"GET", b"HEAD"):
        raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED)
    name = _file_name(server, target)
    body = _read_file(server.folder, name)
    return _Reply(HTTPStatus.OK, body, TYPES[Path(name).suffix], head_only=method == b"HEAD")


def _check_host(server: ReportServer, fields: list[bytes]) -> None:
    """Refuse names that a stranger's DNS could point at this machine."""
    hosts = [f.partition(b":")[2].strip() for f in fields if f.partition(b":")[0].lower() == b"host"]
    if len(hosts) != 1:
        raise _Refused(HTTPStatus.BAD_REQUEST)
    found = re.fullmatch(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?", hosts[0])
    if found is None:
        raise _Refused(HTTPStatus.BAD_REQUEST)
    if int(found[2] or b"80") != server.server_address[1]:
        raise _Refused(HTTPStatus.FORBIDDEN)
    host = found[1].decode("ascii").strip("[]").lower()
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        allowed = host == "localhost"
    else:
        allowed = literal.is_loopback or not server.address.is_loopback
    if not allowed:
        raise _Refused(HTTPStatus.FORBIDDEN)


def _file_name(server: ReportServer, target: bytes) -> str:
    """The one file of the folder that a target names; it is decoded once and then must be a plain name."""
    path = unquote_to_bytes(target.split(b"?", 1)[0])
    prefix = f"/{server.token}/".encode() if server.token else b"/"
    if not secrets.compare_digest(path[: len(prefix)], prefix):
        raise _Refused(HTTPStatus.NOT_FOUND)
    name = path[len(prefix) :] or b"index.html"
    if not _NAME.fullmatch(name) or Path(name.decode("ascii")).suffix not in TYPES:
        raise _Refused(HTTPStatus.NOT_FOUND)
    return name.decode("ascii")


def _read_file(folder: Path, name: str) -> bytes:
    """Contents of a regular file that lies in the folder itself; links of either kind are not followed."""
    path = folder / name
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        if path.is_symlink():
            raise _Refused(HTTPStatus.NOT_FOUND)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise _Refused(HTTPStatus.NOT_FOUND) from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise _Refused(HTTPStatus.NOT_FOUND)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"host must be an IP address or localhost, got {host!r}. Use 127.0.0.1.") from error


def serve(folder: str | Path, *, host: str = "127.0.0.1", port: int = 0, open_browser: bool = False) -> None:
    """Serve a report folder until interrupted (Ctrl-C).

    On any address but this machine's own, a warning is printed and the pages lie behind a random token in the URL.

    Args:
        folder: the folder that `write_report` wrote.
        host: address to listen on.
        port: port, 0 takes a free one.
        open_browser: whether the index is opened in the user's browser.

    Raises:
        ValueError: if ``host``, ``port`` or ``folder`` is not usable.
        OSError: if the address cannot be used.
    """
    with ReportServer(folder, host=host, port=port) as server, contextlib.suppress(KeyboardInterrupt):
        if server.token:
            print(
                f"Warning: {host} can be reached by other machines. Anyone who has the address below, with its "
                "token, can read the report, and it is sent unencrypted.",
                flush=True,
            )
        print(f"Serving {server.folder} at {server.url} (stop with Ctrl-C)", flush=True)
        if open_browser:
            webbrowser.open(server.url)
        server.serve_forever(poll_interval=0.2)
