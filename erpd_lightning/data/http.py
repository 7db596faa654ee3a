"""JSON over HTTP: a request with a time limit, tried again where the server's mistake may pass."""

import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import InvalidArgument, first_line

LONGEST_WAIT = 30.0
"""Seconds between two tries at most, also where the server asks for more."""

LARGEST_REPLY = 2**28
"""Bytes of a reply at most: a server must not fill the memory."""

PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that another try may mend."""

Result = TypeVar("Result")


class ServerError(Exception):
    """A request that got no usable reply, however often it was tried; the message is one line.

    Attributes:
        lasting: Whether the server refused the request, so that another try would be refused too.
    """

    lasting = False


class ServerUnreachable(ServerError):
    """Nobody answers at the address."""


def check_url(url: str, argument: str = "url") -> str:
    """An address of a server without a `/` at its end.

    Raises:
        InvalidArgument: If it is none of `http` or `https`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise InvalidArgument(argument, f"is {url!r}: it must be an address such as http://localhost:8000/v1")
    return url.rstrip("/")


def get_json(url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """What a server has at an address, tried once; see `post_json`."""
    return _exchange(urllib.request.Request(url, headers=dict(headers or {})), timeout)


def post_json(
    url: str,
    body: Any,
    read: Callable[[Any], Result],
    *,
    timeout: float,
    retries: int = 4,
    backoff: float = 1.0,
    headers: Mapping[str, str] | None = None,
) -> Result:
    """Send a JSON value and return what is read from the reply.

    Tried again are connections that fail, replies that take too long, statuses such as 500 and 429, and replies that
    cannot be read: after `backoff` seconds, then twice as many, and so on, or as many as the server asks for.

    Args:
        url: Where to.
        body: What is sent.
        read: Takes the reply, a JSON value; raises ValueError, TypeError, LookupError or AttributeError where it is not
            what it should be.
        timeout: Seconds that one try may take.
        retries: Further tries.
        backoff: Seconds before the second try.
        headers: Further headers.

    Raises:
        ServerUnreachable: If no try reached a server.
        ServerError: If there is no usable reply after all tries, or the server refuses the request.
    """
    data = json.dumps(body).encode()
    all_headers = {"Content-Type": "application/json", **(headers or {})}
    unreachable = True
    for tried in range(1, retries + 2):
        wait = backoff * 2 ** (tried - 1) * random.uniform(0.8, 1.2)
        try:
            request = urllib.request.Request(url, data=data, headers=all_headers, method="POST")
            reply = _exchange(request, timeout)
            unreachable = False
            try:
                return read(reply)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise ServerError(f"{url} answered what cannot be read: {first_line(error)}") from None
        except _Refused as error:
            unreachable = False
            if error.lasting or tried > retries:
                raise
            wait = wait if error.retry_after is None else error.retry_after
        except ServerUnreachable as error:
            if tried > retries:
                raise error if unreachable else ServerError(str(error)) from None
        except ServerError:
            unreachable = False
            if tried > retries:
                raise
        time.sleep(min(wait, LONGEST_WAIT))
    raise AssertionError("the last try returns or raises")


class _Refused(ServerError):
    """A status other than 200, and after how many seconds the server wants to be asked again."""

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.lasting = status not in PASSING


def _exchange(request: urllib.request.Request, timeout: float) -> Any:
    """One request and its reply, within the time limit as a whole."""
    url, end = request.full_url, time.monotonic() + timeout
    try:
        with _opener(request).open(request, timeout=timeout) as response:
            return json.loads(_read(response, url, end, timeout))
    except urllib.error.HTTPError as error:
        with error:
            raise _Refused(_status_line(error, url), error.code, _seconds(error.headers.get("Retry-After"))) from None
    except TimeoutError:
        raise ServerError(f"{url} did not answer within {timeout:g} seconds") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ServerError(f"{url} did not answer within {timeout:g} seconds") from None
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise ServerUnreachable(f"{url} cannot be reached: {reason}") from None
    except (http.client.HTTPException, OSError) as error:
        raise ServerError(f"{url} broke off: {type(error).__name__}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{url} did not answer in JSON: {first_line(error)}") from None


def _read(response: Any, url: str, end: float, timeout: float) -> bytes:
    chunks, size = [], 0
    while chunk := response.read1(2**16):
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise ServerError(f"{url} answered with more than {LARGEST_REPLY} bytes")
        if time.monotonic() > end:
            raise ServerError(f"{url} did not answer within {timeout:g} seconds")
    return b"".join(chunks)


def _opener(request: urllib.request.Request) -> urllib.request.OpenerDirector:
    """Without a proxy where the server runs on this machine."""
    host = urllib.parse.urlsplit(request.full_url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _status_line(error: urllib.error.HTTPError, url: str) -> str:
    try:
        said = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    said = " ".join(said.split())[:200]
    return f"{url} answered with status {error.code}" + (f": {said}" if said else "")


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date
        return None
