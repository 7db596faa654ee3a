"""The HTTP client against a server that speaks through a bare socket: time, size, kept connections, and proxies."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from erpd_lightning.data import http
from erpd_lightning.data.http import HttpClient, ServerError, ServerUnreachable, check_url, pause_before_retry
from erpd_lightning.errors import InvalidArgument

Act = Callable[["ScriptedServer", socket.socket], bool | None]


class ScriptedServer:
    """Does with each request what a function says, and closes the connection unless that returns True.

    Attributes:
        heads: Of all requests.
        connections: How many there were.
    """

    def __init__(self, act: Act) -> None:
        self.heads: list[str] = []
        self.connections = 0
        self.ended = threading.Event()
        self._act = act
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self.ended.set()
        self._listener.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            kept: bool | None = True
            while kept:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    if not (received := connection.recv(1)):
                        return
                    head += received
                self.heads.append(head.decode())
                kept = self._act(self, connection)


Serve = Callable[[Act], ScriptedServer]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[ScriptedServer] = []

    def start(act: Act) -> ScriptedServer:
        started.append(ScriptedServer(act))
        return started[-1]

    yield start
    for server in started:
        server.close()


def reply(content: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def sends(data: bytes, kept: bool = False) -> Act:
    def act(server: ScriptedServer, connection: socket.socket) -> bool:
        connection.sendall(data)
        return kept

    return act


def drips(at_once: bytes, unit: bytes) -> Act:
    """Never as late as the time limit, and not done for some seconds."""

    def act(server: ScriptedServer, connection: socket.socket) -> None:
        connection.sendall(at_once)
        for _ in range(250):
            if server.ended.wait(0.02):
                break
            connection.sendall(unit)

    return act


def failed(client: HttpClient) -> ServerError:
    with pytest.raises(ServerError) as error:
        client.get("/")
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("at_once", "unit"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b""),
    ],
)
def test_the_time_limit_is_of_the_whole_request(serve: Serve, at_once: bytes, unit: bytes) -> None:
    client = HttpClient(serve(drips(at_once, unit)).url, timeout=0.3)
    began = time.monotonic()
    error = failed(client)
    assert (str(error), error.passing) == ("did not answer within 0.3 seconds", True)
    assert 0.25 < time.monotonic() - began < 4
    assert client.in_flight == 0


def test_a_reply_has_a_size_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST_REPLY", 100)
    client = HttpClient(serve(sends(reply(b"1" * 100))).url, timeout=5)
    assert client.get("/") == int("1" * 100)
    client = HttpClient(serve(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"1" * 50)).url, timeout=5)
    assert str(failed(client)) == "answered with more than 100 bytes"


def test_a_reply_that_breaks_off_is_none(serve: Serve) -> None:
    # What has come so far would be JSON by itself.
    error = failed(HttpClient(serve(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n1")).url, timeout=5))
    assert "could not be asked (IncompleteRead" in str(error)
    assert error.passing


def test_what_is_no_json_may_pass(serve: Serve) -> None:
    for content in (b"<html>", b"[" * 100_000):
        error = failed(HttpClient(serve(sends(reply(content))).url, timeout=5))
        assert str(error).startswith("answered with something else than JSON: ")
        assert error.passing
    assert HttpClient(serve(sends(reply(b""))).url, timeout=5).get("/health") is None


def test_a_connection_is_kept_until_the_server_closes_it(serve: Serve) -> None:
    server = serve(lambda server, connection: sends(reply(b"{}"), kept=len(server.heads) < 3)(server, connection))
    client = HttpClient(server.url, timeout=5)
    for _ in range(3):
        assert client.get("/") == {}
    assert server.connections == 1
    time.sleep(0.2)  # The third reply was the last one on that connection, without saying so.
    assert client.get("/") == {}
    assert server.connections == 2


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"


@pytest.mark.parametrize("at_once", [b"", HEAD + b"\r\n12", HEAD + b"Connection: close\r\n\r\n12"])
def test_closing_gives_up_what_is_in_flight(serve: Serve, at_once: bytes) -> None:
    def act(server: ScriptedServer, connection: socket.socket) -> None:
        connection.sendall(at_once)
        server.ended.wait(30)

    server = serve(act)
    client = HttpClient(server.url, timeout=20)
    errors: list[ServerError] = []
    waiting = threading.Thread(target=lambda: errors.append(failed(client)))
    began = time.monotonic()
    waiting.start()
    while not server.heads:
        time.sleep(0.01)
    time.sleep(0.05)
    client.close()
    waiting.join()
    assert time.monotonic() - began < 5
    assert errors[0].passing
    error = failed(client)
    assert (str(error), error.passing) == ("is not asked any more", False)


@pytest.mark.parametrize(
    ("status", "content", "said", "passing"),
    [
        ("429 Slow", b'{"error": {"message": "too\\n many"}}', "status 429: too many", True),
        ("400 Bad", b'{"detail": "no such field"}', "status 400: no such field", False),
        ("404 No", b"{}", "status 404", False),
        ("500 Oh", b"<html>\n <b>oh</b>", "status 500: <html> <b>oh</b>", True),
        ("501 Never", b"", "status 501", False),
        ("529 Busy", b"x" * 999, f"status 529: {'x' * 200}…", True),
        ("301 Moved", b"", "status 301", False),
    ],
)
def test_statuses(serve: Serve, status: str, content: bytes, said: str, passing: bool) -> None:
    error = failed(HttpClient(serve(sends(reply(content, status))).url, timeout=5))
    assert (str(error), error.passing) == (f"answered with {said}", passing)
    assert error.status == int(status.split()[0])
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("told", "seconds"), [("7", 7.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("Wed, 21 Oct 2026", None)]
)
def test_when_the_server_wants_to_be_asked_again(serve: Serve, told: str, seconds: float | None) -> None:
    server = serve(sends(reply(b"", "503 Later", f"Retry-After: {told}")))
    assert failed(HttpClient(server.url, timeout=5)).retry_after == seconds


def test_pauses_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    expected: list[float] = [1, 2, 4, 8, 16, 30, 30]
    for failures in range(1, 8):
        pause_before_retry(failures, None)
    for asked, least in [(0.0, 0.0), (5.0, 5.0), (3600.0, 30.0)]:
        pause_before_retry(3, asked)
        expected.append(least)
    for seconds, least in zip(slept, expected, strict=True):
        assert least <= seconds <= 1.25 * least


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = failed(HttpClient(f"http://127.0.0.1:{port}", timeout=5))
    assert isinstance(error, ServerUnreachable)
    assert (str(error), error.passing) == ("cannot be reached: Connection refused", True)
    long_name = HttpClient(f"http://{'a' * 64}.invalid", timeout=5)
    assert isinstance(failed(long_name), ServerUnreachable)


# Proxies


def test_another_machine_is_asked_through_the_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(sends(reply(b"1")))
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
    assert HttpClient("http://judge.invalid:8000/v1", 5, {"Authorization": "Bearer key"}).get("/models") == 1
    lines = proxy.heads[0].splitlines()
    assert lines[0] == "GET http://judge.invalid:8000/v1/models HTTP/1.1"
    assert {"Host: judge.invalid:8000", "Authorization: Bearer key"} <= set(lines)
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in lines  # me:p@ss
    own = serve(sends(reply(b"2")))
    assert HttpClient(own.url, timeout=5).get("/") == 2
    assert own.heads[0].startswith("GET / HTTP/1.1\r\n")
    monkeypatch.setenv("no_proxy", ".invalid")
    assert "through" not in str(failed(HttpClient("http://judge.invalid:8000/v1", timeout=5)))
    assert len(proxy.heads) == 1


def test_a_tunnel_is_asked_for_without_the_servers_headers(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(sends(b"HTTP/1.0 403 Forbidden\r\n\r\n"))
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.port}")
    error = failed(HttpClient("https://judge.invalid/v1", 5, {"Authorization": "Bearer key"}))
    assert isinstance(error, ServerUnreachable)
    assert str(error).startswith(
        f"cannot be reached through the proxy 127.0.0.1:{proxy.port}: Tunnel connection failed"
    )
    assert proxy.heads[0].startswith("CONNECT judge.invalid:443 HTTP/1.")
    assert "key" not in proxy.heads[0]


def test_a_proxy_that_is_none_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(InvalidArgument, match=r"^https_proxy is 'socks5://127\.0\.0\.1:1'"):
        HttpClient("https://judge.invalid", timeout=5)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "file:///etc/passwd", "http://", "http://a:b", "http://a:0", "http://a/v1?b", "http://["],
)
def test_what_is_no_address(url: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^urls\[1\] is '.*': it must be an address such as http"):
        check_url(url, "urls[1]")


def test_an_address() -> None:
    assert check_url("https://[::1]:8000/v1/") == "https://[::1]:8000/v1"
