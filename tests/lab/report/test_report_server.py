"""The server: loopback only, read only, nothing from outside its folder, and no way to keep others waiting."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from pullback.lab.report import ReportServer, serve
from pullback.lab.report import server as module

SECRET = b"outside the folder"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.html").write_bytes(SECRET)
    inside = tmp_path / "report"
    inside.mkdir()
    (inside / "index.html").write_text("<h1>index</h1>", encoding="utf-8")
    (inside / "dann.html").write_text("<h1>dann</h1>", encoding="utf-8")
    (inside / "index.md").write_text("# index", encoding="utf-8")
    (inside / "store.sqlite").write_bytes(SECRET)
    (inside / ".hidden.html").write_bytes(SECRET)
    (inside / "soft.html").symlink_to(tmp_path / "secret.html")
    os.link(tmp_path / "secret.html", inside / "hard.html")
    os.mkfifo(inside / "pipe.html")
    (inside / "folder.html").mkdir()
    (inside / "folder.html" / "inner.html").write_bytes(SECRET)
    return inside


@pytest.fixture
def running(folder):
    with started(folder) as server:
        yield server


@contextlib.contextmanager
def started(folder, **more):
    with ReportServer(folder, **more) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, target="/", *, method="GET", host=None, raw=None, timeout=5.0):
    port = server.server_address[1]
    host = f"127.0.0.1:{port}" if host is None else host
    request = (
        raw if raw is not None else f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    )
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        with contextlib.suppress(ConnectionError):  # the server may refuse before it has read everything
            connection.sendall(request)
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, head.decode("latin-1"), body


def test_the_index_and_its_neighbours_are_served(running):
    assert ask(running) == ask(running, "/index.html")
    status, head, body = ask(running, "/dann.html?x=1")
    assert (status, body) == (200, b"<h1>dann</h1>")
    assert "Content-Type: text/html; charset=utf-8" in head
    assert "text/plain" in ask(running, "/index.md")[1]


def test_every_reply_carries_the_protective_headers(running):
    for target in ("/", "/nothing.html"):
        head = ask(running, target)[1]
        for line in ("X-Content-Type-Options: nosniff", "X-Frame-Options: DENY", "Cache-Control: no-store",
                     "Referrer-Policy: no-referrer", "frame-ancestors 'none'"):  # fmt: skip
            assert line in head
        assert "Access-Control" not in head


def test_head_has_no_body(running):
    status, head, body = ask(running, "/dann.html", method="HEAD")
    assert (status, body) == (200, b"")
    assert "Content-Length: 13" in head


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get"])
def test_nothing_but_reading_is_allowed(running, method):
    status, head, _ = ask(running, method=method)
    assert status == 405
    assert "Allow: GET, HEAD" in head


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "192.0.2.7:{port}", "localhost:1",
             "127.0.0.1"]
)  # fmt: skip
def test_foreign_host_names_are_refused(running, host):
    assert ask(running, host=host.format(port=running.server_address[1]))[0] == 403


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"])
def test_own_host_names_are_served(running, host):
    assert ask(running, host=host.format(port=running.server_address[1]))[0] == 200


@pytest.mark.parametrize(
    "raw",
    [b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /\r\n\r\n", b"\r\n\r\n",
     b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", b"\x16\x03\x01\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"],
)  # fmt: skip
def test_malformed_requests_are_refused(running, raw):
    assert ask(running, raw=raw)[0] == 400


def test_long_request_lines_and_headers_are_refused(running):
    assert ask(running, raw=b"GET /" + b"a" * 9_000)[0] == 414
    assert ask(running, raw=b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000)[0] == 431


@pytest.mark.parametrize(
    "target",
    ["/../secret.html", "/%2e%2e/secret.html", "/%252e%252e/secret.html", "/..\\secret.html", "//etc/passwd",
     "/..%2fsecret.html", "/%2e%2e%5csecret.html", "/index.html%00.md", "/index.html\x00", "/#/../secret.html",
     "/soft.html", "/hard.html", "/pipe.html", "/folder.html", "/folder.html/inner.html", "/store.sqlite",
     "/.hidden.html", "/.", "/..", "/./index.html", "http://127.0.0.1/index.html", "index.html", "*", "/CON.html",
     "/index.html/", "/index.HTML", "/C:\\secret.html", "/~root/x.html"],
)  # fmt: skip
def test_nothing_outside_the_folder_is_served(running, target):
    status, _, body = ask(running, target)
    assert status == 404
    assert SECRET not in body


def test_a_thousand_random_paths_give_nothing_from_outside(running):
    rng = random.Random(0)
    parts = ["..", "%2e%2e", "%252e", "/", "\\", "%2f", "%5c", "secret.html", "etc", "passwd", ".", "%00", "#",
             "?", ";", "index.html", "soft.html", "hard.html", "%c0%ae", "\xff", "folder.html", "~", ":"]  # fmt: skip
    for _ in range(1_000):
        target = "/" + "".join(rng.choice(parts) for _ in range(rng.randint(1, 8)))
        head = f"GET {target} HTTP/1.1\r\nHost: localhost:{running.server_address[1]}".encode("latin-1")
        try:
            body = module.answer(running, head).body
        except module._Refused:
            continue
        assert body == b"<h1>index</h1>"


def test_fifty_silent_connections_keep_nobody_waiting(running):
    port = running.server_address[1]
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            slow.sendall(b"GET / HTTP/1.1\r\nX: ")
        begin = time.monotonic()
        assert ask(running)[0] == 200
        assert time.monotonic() - begin < module.HEADER_SECONDS / 2
        assert running._open <= module.CONNECTIONS


def test_a_slow_client_is_disconnected(running, monkeypatch):
    monkeypatch.setattr(module, "HEADER_SECONDS", 0.1)
    assert ask(running, raw=b"GET / HT")[0] == 408


def test_places_are_given_back(running):
    for _ in range(3 * module.CONNECTIONS):
        assert ask(running)[0] == 200
    deadline = time.monotonic() + 5
    while running._open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running._open == 0
    assert not running._waiting


def test_it_listens_on_this_machine_only(running):
    assert running.server_address[0] == "127.0.0.1"
    assert running.url == f"http://127.0.0.1:{running.server_address[1]}/"
    assert running.token == ""


def test_other_addresses_need_the_token(folder):
    with started(folder, host="0.0.0.0") as server:
        assert len(server.token) >= 32
        own = f"192.0.2.7:{server.server_address[1]}"
        assert ask(server, "/", host=own)[0] == 404
        assert ask(server, "/index.html", host=own)[0] == 404
        assert ask(server, f"/{'x' * len(server.token)}/index.html", host=own)[0] == 404
        assert ask(server, f"/{server.token}/", host=own)[2] == b"<h1>index</h1>"
        assert ask(server, f"/{server.token}/../secret.html", host=own)[0] == 404
        assert ask(server, f"/{server.token}/", host=f"evil.example:{server.server_address[1]}")[0] == 403
        assert server.url.endswith(f"/{server.token}/")


def test_bad_arguments_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"host must be an IP address or localhost, got 'example\.org'"):
        serve(folder, host="example.org")
    with pytest.raises(ValueError, match="port must be 0 to 65535, got 70000"):
        serve(folder, port=70_000)
    with pytest.raises(ValueError, match="folder must hold a report"):
        serve(tmp_path / "nowhere")


def test_a_taken_port_is_named(running, folder):
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1 port \d+: .* Choose another --port"):
        serve(folder, port=running.server_address[1])


def test_serve_prints_its_address_and_stops_on_interrupt(folder):
    # A shell that starts tests in the background lets them ignore interrupts; the server must hear this one.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pullback.lab.report.server import serve; serve(sys.argv[1], host=sys.argv[2])"
    )
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with subprocess.Popen([sys.executable, "-c", code, str(folder), host], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(1 + warned)]
            assert re.search(r"at http://\S+:\d+/", lines[-1])
            assert ("Warning" in lines[0]) == warned
            process.send_signal(2)
            try:
                _, errors = process.communicate(timeout=20)
            finally:
                process.kill()  # without it, leaving the block would wait for a server that did not stop
        assert process.returncode == 0
        assert errors == ""
