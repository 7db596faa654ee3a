"""Requests to one or several servers: many in flight, made again where that helps, given up together."""

import threading
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ...errors import InvalidArgument, UserError
from ..http import HttpClient, ServerError, pause_before_retry
from ..progress import tell_drawn
from .base import Response
from .managed_server import ManagedServer
from .protocols import AnswerError, Draw, ServerProtocol

T = TypeVar("T")
Ask = Callable[[dict[str, Any]], Any]
"""Gives a server's answer to the body of a request."""

HEALTH_SECONDS = 5.0
LOOK_SECONDS = 0.2

MOST_RESTARTS = 3
"""A server of our own that ends more often than this has something wrong with it that starting does not mend."""


class Requests:
    """Asks servers for responses.

    Args:
        protocol: What they speak.
        urls: Servers that run already.
        managed: A server to start instead, or None.
        max_requests: Requests in flight at a time.
        timeout: Seconds that one may take.
        retries: How often one that failed is made again.
        start_timeout: Seconds that the managed server may take to start.

    Attributes:
        clients: The servers.
        model: What they call the policy, or None for the only one that they have.
    """

    def __init__(
        self,
        protocol: ServerProtocol,
        urls: Sequence[str],
        managed: ManagedServer | None,
        max_requests: int,
        timeout: float,
        retries: int,
        start_timeout: float,
    ) -> None:
        self.protocol = protocol
        self.clients = [HttpClient(url, timeout) for url in urls]
        self.model: str | None = None
        self._managed = managed
        self._max_requests = max_requests
        self._timeout = timeout
        self._retries = retries
        self._start_timeout = start_timeout
        self._restarts = 0
        self._is_stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the managed server.

        Raises:
            UserError: If it does not start.
        """
        if self._managed is not None:
            self._managed.start(self._answers, self._start_timeout)
            self.clients = [HttpClient(self._managed.url, self._timeout)]

    def stop(self) -> None:
        """Give up what is in flight, and end the managed server."""
        self._is_stopped = True
        for client in self.clients:
            client.close()
        if self._managed is not None:
            with self._lock:  # It may be about to start again.
                self._managed.stop()

    def responses(self, draws: Sequence[Draw], vocabulary: int, last: Set[int]) -> list[Response]:
        """The responses, in order.

        Args:
            draws: What to draw.
            vocabulary: Size of the policy's vocabulary.
            last: Tokens that a response may end with by itself.

        Raises:
            UserError: If there is one that no server gives.
        """

        def one(draw: Draw) -> Response:
            def read(answer: Any, ask: Ask) -> Response:
                return checked(self.protocol.response(answer, draw, ask), draw, vocabulary, last)

            response = self.ask(draw, 0, read)
            tell_drawn(len(response.ids), 1)
            return response

        return self._together(one, draws)

    def ask(self, draw: Draw, top: int, read: Callable[[Any, Ask], T]) -> T:
        """What is read from a server's answer to a request, which is made again where that may help.

        Args:
            draw: What to draw.
            top: How many of the most probable tokens are to be listed at each position.
            read: Reads an answer, and may ask the server for more; an `AnswerError` says what is wrong with it.

        Raises:
            UserError: If the request keeps failing, or its answer is of no use.
        """
        body = self.protocol.request(draw, top)
        avoided: HttpClient | None = None
        for tried in range(1, self._retries + 2):
            client = self._least_busy(avoided)
            ask = partial(client.post, self.protocol.completion_path)
            try:
                return read(ask(body), ask)
            except ServerError as error:
                problem = f"the {self.protocol.name} server at {client.url} {error}"
                if not error.passing:
                    raise UserError(problem) from None
                if tried > self._retries:
                    raise UserError(f"{problem}; asked {tried} times (retries)") from None
                retry_after = error.retry_after
            avoided = client
            self._revive(client)
            pause_before_retry(tried, retry_after)
        raise AssertionError

    def _least_busy(self, avoided: HttpClient | None) -> HttpClient:
        """The server with the fewest requests in flight; another than the one that has just failed, if there is one."""
        clients = [client for client in self.clients if client is not avoided] or self.clients
        return min(clients, key=lambda client: client.in_flight)

    def _revive(self, client: HttpClient) -> None:
        """Start the managed server again if it has ended; one thread does, the others wait for it."""
        if self._managed is None:
            return
        with self._lock:
            if self._is_stopped or client not in self.clients or self._managed.is_running:
                return
            self._restarts += 1
            if self._restarts > MOST_RESTARTS:
                raise InvalidArgument(
                    "sampler.command",
                    f"started a server that ended {self._restarts} times while it was sampled from: see "
                    f"{self._managed.log}",
                )
            self.start()

    def _answers(self, url: str) -> bool:
        """Whether a server is ready.

        Raises:
            UserError: If it is not asked for any more.
        """
        if self._is_stopped:
            raise UserError("sampling has ended")
        client = HttpClient(url, HEALTH_SECONDS)
        with suppress(ServerError):
            client.get(self.protocol.health_path)
            return True
        return False

    def _together(self, act: Callable[[Draw], T], draws: Sequence[Draw]) -> list[T]:
        """Call `act` on each draw, in threads; the first error ends them all."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []
        todo = iter(enumerate(draws))
        lock = threading.Lock()

        def work() -> None:
            while not errors:
                with lock:
                    index, draw = next(todo, (-1, None))
                if draw is None:
                    return
                try:
                    results[index] = act(draw)
                except BaseException as error:
                    errors.append(error)

        # Daemons: a thread that waits for a server must not keep the program from ending.
        count = min(self._max_requests, len(draws))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while not errors and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(LOOK_SECONDS)
                if errors:
                    break
        if errors:
            raise errors[0]
        return [results[index] for index in range(len(draws))]


def checked(response: Response, draw: Draw, vocabulary: int, last: Set[int]) -> Response:
    """The response, up to its first end token.

    Raises:
        AnswerError: If it has a token that the policy does not know, is too long, or lacks the token that ended it.
    """
    ids, logps, reason = response
    if unknown := next((token for token in ids if not 0 <= token < vocabulary), None):
        raise AnswerError(f"drew token {unknown}, but the policy has {vocabulary} of them: it serves another policy")
    # A server may take fewer tokens for the end than the policy names.
    if (end := next((i for i, token in enumerate(ids) if token in draw.ends), None)) is not None:
        return Response(ids[: end + 1], logps[: end + 1], "stop")
    if len(ids) > draw.max_new_tokens:
        raise AnswerError(f"gave {len(ids)} tokens where at most {draw.max_new_tokens} were asked for")
    if reason == "stop" and ids[-1] not in last:
        raise AnswerError(
            f"ended a response by itself after token {ids[-1]}, which is no end token of the policy: the token that "
            "ended it is missing, or the server was started with stop strings"
        )
    if reason == "length" and len(ids) < draw.max_new_tokens:
        raise AnswerError(
            f"cut a response off after {len(ids)} of {draw.max_new_tokens} tokens: its context is too short for prompt "
            "and response"
        )
    return response
