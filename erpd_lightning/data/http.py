"""JSON over HTTP to one server, from many threads, in a way that can be given up at any moment."""

import base64
import http.client
import io
import json
import random
import selectors
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from ..errors import InvalidArgument, first_line, shortened

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""At most before a request is made again, also where the server asks for more; up to a quarter is added."""

LARGEST_REPLY = 2**28
"""Bytes of a reply at most: a server must not fill the memory."""

PASSING_STATUS = {408, 409, 425, 429}
"""Statuses of the 400s that say "not now"."""

LASTING_STATUS = {501, 505}
"""Statuses of the 500s that say "never"."""


class ServerError(Exception):
    """A request that got no usable reply.

    Args:
        problem: What happened, as the rest of a sentence that begins with the server.
        passing: Whether asking again may help.
        status: The HTTP status, where it is an error.
        retry_after: Seconds after which the server wants to be asked again, where it says so.
    """

    def __init__(
        self, problem: str, passing: bool = True, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(problem)
        self.passing = passing
        self.status = status
        self.retry_after = retry_after


class ServerUnreachable(ServerError):
    """Nobody takes connections at the address."""


def check_url(url: str, argument: str = "url") -> str:
    """An address of a server without a `/` at its end.

    Raises:
        InvalidArgument: If it is none of `http` or `https`, or has a query.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise InvalidArgument(argument, f"is {url!r}: it must be an address such as http://localhost:8000")
    return url.rstrip("/")


def pause_before_retry(failures: int, retry_after: float | None) -> None:
    """Sleep for 1, 2, 4, … seconds after so many failures, or as long as the server asks for; half a minute at most.

    Args:
        failures: How often the request has failed, from 1 on.
        retry_after: Of the last `ServerError`.
    """
    seconds = FIRST_PAUSE_SECONDS * 2 ** (failures - 1) if retry_after is None else retry_after
    # Requests that failed together are not to come back together.
    time.sleep(min(seconds, LONGEST_PAUSE_SECONDS) * random.uniform(1.0, 1.25))


class HttpClient:
    """Connections to a server, one for each request that is in flight, kept open for the next.

    A server on another machine is asked through the proxy that the environment names for it (`http_proxy`,
    `https_proxy`, `no_proxy`), if there is one.

    Args:
        url: Of the server, such as `http://localhost:8000`; a path in it is put before all others.
        timeout: Seconds that a request may take, from connecting to the last byte of the reply.
        headers: Further headers of each request.

    Raises:
        InvalidArgument: If the URL, or the proxy's, is none.
    """

    def __init__(self, url: str, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        self.url = check_url(url)
        self.timeout = timeout
        self._parts = urlsplit(self.url)
        self._proxy = _proxy(self._parts)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self._path = self._parts.path
        if self._proxy is not None and self._parts.scheme == "http":
            self._path = self.url  # What a proxy is asked for.
            self._headers |= _proxy_headers(self._proxy)
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: dict[http.client.HTTPConnection, socket.socket | None] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Requests that wait for a reply."""
        return len(self._busy)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON value at a path; None where there is nothing but a status that is no error.

        Raises:
            ServerError: If there is none.
        """
        return self._ask("GET", path, None, timeout or self.timeout)

    def post(self, path: str, body: Any) -> Any:
        """What the server replies to a JSON value.

        Raises:
            ServerUnreachable: If nobody takes connections.
            ServerError: If it does not reply in time, with an error, or with something else than JSON.
        """
        return self._ask("POST", path, json.dumps(body).encode(), self.timeout)

    def close(self) -> None:
        """Give up what is in flight: the threads that wait for it get an error at once, and so does who asks later."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            sockets = list(self._busy.values())
        for connection in idle:
            connection.close()
        for each in sockets:
            if each is not None:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        end = time.monotonic() + timeout
        try:
            with self._connection(timeout) as (connection, sock):
                sock.settimeout(_left(end))
                connection.request(method, self._path + path, body, self._headers)
                sock.settimeout(_left(end))
                with connection.getresponse() as response:
                    content, status = _content(response), response.status
                    retry_after = _seconds(response.getheader("Retry-After"))
        except TimeoutError:
            raise ServerError(f"did not answer within {timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"could not be asked ({type(error).__name__}: {first_line(error)})") from None
        if status != 200:
            passing = status in PASSING_STATUS or (status >= 500 and status not in LASTING_STATUS)
            raise ServerError(f"answered with status {status}{_message(content)}", passing, status, retry_after)
        if not content.strip() and method == "GET":  # A health check may say no more than its status.
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            shown = content[:60].decode(errors="replace")
            raise ServerError(f"answered with something else than JSON: {shown!r}") from None

    @contextmanager
    def _connection(self, timeout: float) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        """A connection of one's own, and its socket; it is kept unless the request failed."""
        connection = self._take()
        try:
            if connection.sock is None:
                self._connect(connection, timeout)
            sock: socket.socket = connection.sock
            with self._lock:
                if self._closed:  # While it was connecting.
                    raise _given_up()
                self._busy[connection] = sock  # The connection forgets it where the server ends it after the reply.
            yield connection, sock
        except BaseException:
            with self._lock:
                self._busy.pop(connection)
                # The other idle ones are to the same server, which may have gone and come back since.
                idle, self._idle = self._idle, []
            for each in (connection, *idle):
                each.close()
            raise
        with self._lock:
            self._busy.pop(connection)
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _take(self) -> http.client.HTTPConnection:
        """An idle connection, or a new one, which is busy from now on."""
        with self._lock:
            if self._closed:
                raise _given_up()
            connection = self._idle.pop() if self._idle else self._new()
            if connection.sock is not None and _is_readable(connection.sock):
                connection.close()  # The server did: it connects anew.
            self._busy[connection] = None
        return connection

    def _new(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        target = self._proxy or self._parts
        connection = kind(target.hostname or "", target.port)
        connection.response_class = _Response
        if self._proxy is not None and self._parts.scheme == "https":
            connection.set_tunnel(self._parts.hostname or "", self._parts.port, _proxy_headers(self._proxy))
        return connection

    def _connect(self, connection: http.client.HTTPConnection, timeout: float) -> None:
        connection.timeout = timeout
        try:
            connection.connect()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # A host name may not be encodable.
            through = "" if self._proxy is None else f" through the proxy {self._proxy.hostname}:{self._proxy.port}"
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ServerUnreachable(f"cannot be reached{through}: {reason}") from None


class _Response(http.client.HTTPResponse):
    """A reply that as a whole takes no longer than the timeout that its socket has when it begins."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimeLimited(sock, self.fp.detach()))


class _TimeLimited(io.RawIOBase):
    """The bytes of a socket, each of which may come late, but not all of them one after another."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw
        self._end = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._end))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(end: float) -> float:
    """Seconds until a moment of `time.monotonic`.

    Raises:
        TimeoutError: If there are none.
    """
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _content(response: http.client.HTTPResponse) -> bytes:
    chunks, size = [], 0
    while chunk := response.read1(2**16):
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise ServerError(f"answered with more than {LARGEST_REPLY} bytes")
    if response.length:  # Fewer came than were announced.
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


def _is_readable(sock: socket.socket) -> bool:
    """Whether something came over a connection on which nothing was asked: its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _given_up() -> ServerError:
    return ServerError("is not asked any more", passing=False)


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a server; None for one on this machine."""
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    is_local = host in ("localhost", "::1") or host.startswith("127.")
    if not proxy or is_local or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urlsplit(check_url(proxy if "://" in proxy else f"http://{proxy}", f"{parts.scheme}_proxy"))


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}


def _message(content: bytes) -> str:
    """What a server says of an error, as the end of a sentence: the message in its JSON, or its text."""
    text = content.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        while isinstance(found, dict):
            found = found.get("error") or found.get("message") or found.get("detail")
        text = str(found or "")
    line = " ".join(text.split())
    return f": {shortened(line)}" if line else ""


def _seconds(text: str | None) -> float | None:
    """Of a header `Retry-After`; None for a date."""
    with suppress(ValueError):
        seconds = float(text or "")
        if seconds >= 0:
            return seconds
    return None
