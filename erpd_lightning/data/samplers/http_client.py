"""JSON over HTTP to one server, from many threads, in a way that can be given up at any moment."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from ...errors import InvalidArgument

PASSING_STATUS = {408, 409, 425, 429}
"""Statuses of the 400s that say "not now"."""


class ServerError(Exception):
    """A request that was not answered, or with an error.

    Args:
        problem: What happened, as the rest of a sentence that begins with the server.
        passing: Whether asking again may help.
        status: The HTTP status, where there was any.
    """

    def __init__(self, problem: str, passing: bool = True, status: int | None = None) -> None:
        super().__init__(problem)
        self.passing = passing
        self.status = status


class HttpClient:
    """Connections to a server, one for each request that is in flight, kept open for the next.

    Args:
        url: Of the server, such as `http://localhost:8000`; a path in it is put before all others.
        timeout: Seconds that a request may go without an answer.

    Raises:
        InvalidArgument: If the URL is none.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._parts = check_url(url)
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Requests that wait for an answer."""
        return len(self._busy)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON value at a path.

        Raises:
            ServerError: If there is none.
        """
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: Any) -> Any:
        """What the server answers to a JSON value.

        Raises:
            ServerError: If it does not answer in time, with an error, or with something else than JSON.
        """
        return self._ask("POST", path, json.dumps(body).encode(), None)

    def close(self) -> None:
        """Give up what is in flight: the threads that wait for it get an error at once."""
        with self._lock:
            self._closed = True
            connections, self._idle = [*self._idle, *self._busy], []
        for connection in connections:
            if (sock := connection.sock) is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        with self._connection(timeout or self.timeout) as connection:
            try:
                connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
                answer = connection.getresponse()
                content, status = answer.read(), answer.status
            except TimeoutError:
                raise ServerError(f"did not answer within {timeout or self.timeout:g} seconds") from None
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"could not be asked ({type(error).__name__}: {error})") from None
        if status != 200:
            passing = status >= 500 or status in PASSING_STATUS
            raise ServerError(f"answered with status {status}{_message(content)}", passing, status)
        if not content.strip() and method == "GET":  # A health check may say no more than its status.
            return None
        try:
            return json.loads(content)
        except ValueError:
            shown = content[:60].decode(errors="replace")
            raise ServerError(f"answered with something else than JSON: {shown!r}", passing=False) from None

    @contextmanager
    def _connection(self, timeout: float) -> Iterator[http.client.HTTPConnection]:
        """A connection of one's own, which is kept unless the request failed."""
        with self._lock:
            if self._closed:
                raise ServerError("is not asked any more", passing=False)
            connection = self._idle.pop() if self._idle else self._new()
            self._busy.add(connection)
        try:
            connection.timeout = timeout
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            yield connection
        except BaseException:
            with self._lock:
                self._busy.discard(connection)
                # The other idle ones are to the same server, which may have gone and come back since.
                idle, self._idle = self._idle, []
            for each in (connection, *idle):
                each.close()
            raise
        with self._lock:
            self._busy.discard(connection)
            self._idle.append(connection)

    def _new(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout)


def check_url(url: str) -> Any:
    """The parts of a URL.

    Raises:
        InvalidArgument: If it is not one of HTTP with a host.
    """
    parts = urlsplit(url)
    with suppress(ValueError):
        _ = parts.port  # Raises for one that is no number.
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    raise InvalidArgument("urls", f"holds {url!r}: it must be a list of URLs such as http://localhost:8000")


def _message(content: bytes) -> str:
    """What a server says of an error, as the end of a sentence: the message in its JSON, or its first line."""
    text = content.decode(errors="replace").strip()
    with suppress(ValueError):
        found = json.loads(text)
        while isinstance(found, dict):
            found = found.get("error") or found.get("message") or found.get("detail")
        text = str(found or "")
    line = next(iter(text.splitlines()), "")
    return f": {line[:150]}" if line else ""
