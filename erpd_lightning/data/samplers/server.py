"""Sampling from an inference server: token ids go in, token ids and their log-probs come back."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidArgument, UserError, check_at_least
from ...models.generation import eos_token_ids
from ...models.loading import vocabulary_size
from ...seeds import derive_seed
from ..http import check_url
from .base import Response, Sampler
from .managed_server import ManagedServer, check_command
from .protocols import Draw, ServerProtocol
from .requests import Requests
from .server_checks import check_logps, check_policy
from .transformers import TransformersSampler


class ServerSampler(Sampler):
    """Samples from servers of vLLM, SGLang or llama.cpp, which run in an environment of their own.

    Either the sampler starts a server on the policy itself, with `command`, and ends it when sampling is done; each
    process that samples has one of its own. Or it asks servers that run already, at `urls`; they must serve the policy
    that is sampled from, and nobody updates their weights from round to round.

    Text is never tokenised again. The log-probs must be those of the tempered policy over the whole vocabulary, which
    is checked before the first response is drawn. A request that fails is made again, of another server where there
    are several; a server of the sampler's own that has ended is started again.

    Args:
        protocol: What the servers speak.
        command: Command line that starts a server, not run by a shell; `{policy}` and `{port}` stand where policy and
            port come.
        urls: Servers that run already, such as `http://localhost:8000`.
        served_as: What the servers at `urls` call the policy, where it is not by its folder or hub name; that it is
            the same policy is then not checked.
        max_new_tokens: Longest response in tokens.
        temperature: What the logits are divided by.
        batch_size: Responses that are asked for, and stored, together.
        max_requests: Requests in flight at a time.
        timeout: Seconds that one response may take.
        retries: How often a request that failed is made again, after pauses of a second to half a minute that double
            each time.
        start_timeout: Seconds that a server started by `command` may take until it answers.

    Raises:
        InvalidArgument: For a value out of range, or if not exactly one of `command` and `urls` is given.
    """

    needs_model = False
    operational_arguments = frozenset(
        {"command", "urls", "served_as", "max_requests", "timeout", "retries", "start_timeout"}
    )

    def __init__(
        self,
        protocol: ServerProtocol,
        command: str | None = None,
        urls: Sequence[str] = (),
        served_as: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int = 1024,
        max_requests: int = 128,
        timeout: float = 1800.0,
        retries: int = 8,
        start_timeout: float = 1200.0,
    ) -> None:
        super().__init__(max_new_tokens, temperature, batch_size)
        check_at_least(1, max_requests=max_requests)
        check_at_least(0, retries=retries)
        for name, seconds in {"timeout": timeout, "start_timeout": start_timeout}.items():
            if not 0 < seconds < float("inf"):
                raise InvalidArgument(name, f"is {seconds}: it must be above 0 seconds, and finite")
        if (command is None) == (not urls):
            raise InvalidArgument(
                "command",
                "or urls must be given, and not both: a command line that starts a server, or servers that run",
            )
        if command is None:
            for number, url in enumerate(urls):
                check_url(url, f"urls[{number}]")
        else:
            check_command(command)
            if served_as is not None:
                raise InvalidArgument("served_as", "is for servers at urls: what command starts is named by the policy")
        self.protocol = protocol
        self.command = command
        self.urls = list(urls)
        self.served_as = served_as
        self.max_requests = max_requests
        self.timeout = timeout
        self.retries = retries
        self.start_timeout = start_timeout
        self._requests: Requests | None = None
        self._vocabulary_size = 0
        self._is_checked = False

    @property
    def in_process(self) -> Sampler:
        """See `Sampler`: `TransformersSampler` with the same length and temperature."""
        return TransformersSampler(self.max_new_tokens, self.temperature)

    @contextmanager
    def serving(self, policy: str | Path, folder: Path, device: int | None = None) -> Iterator[None]:
        """See `Sampler.serving`. The output of a server that is started goes to a file `server-*.log` in the folder.

        Raises:
            UserError: If a server does not start or answer, or serves another policy.
        """
        self._vocabulary_size = vocabulary_size(policy)
        self._is_checked = False
        managed = None
        if self.command is not None:
            _free_device_memory()
            log = folder / f"server-{os.environ.get('LOCAL_RANK', '0')}.log"
            managed = ManagedServer(self.command, policy, log, device)
        self._requests = requests = Requests(
            protocol=self.protocol,
            urls=self.urls,
            managed=managed,
            max_requests=self.max_requests,
            timeout=self.timeout,
            retries=self.retries,
            start_timeout=self.start_timeout,
        )
        try:
            requests.start()
            if managed is None:
                names = [check_policy(self.protocol, client, policy, self.served_as) for client in requests.clients]
                requests.model = names[0]
            yield
        finally:
            self._requests = None
            requests.stop()

    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        """See `Sampler.sample`; as far as the server is deterministic.

        Args:
            model: Is not asked: the servers have the policy that they were started with.
            tokenizer: The policy's tokenizer.
            prompts: Token ids.
            seed: Each request has a seed of its own, made of it and of the request's number.

        Raises:
            UserError: If the servers give no usable answer.
        """
        if self._requests is None:
            raise UserError(
                "ServerSampler samples from the policy in a folder, within its serving(policy, folder): take its "
                "in_process for a policy in memory"
            )
        if not prompts:
            return []
        ends = sorted(eos_token_ids(tokenizer))
        settings = (self.max_new_tokens, self.temperature)
        draws = [
            Draw(prompt, *settings, derive_seed(seed, "request", i) % 2**31, ends, self._requests.model)
            for i, prompt in enumerate(prompts)
        ]
        if not self._is_checked:
            check_logps(self.protocol, self._requests, draws[0], self._vocabulary_size)
            self._is_checked = True
        vocabulary = max(self._vocabulary_size, len(tokenizer))
        return self._requests.responses(draws, vocabulary, set(tokenizer.all_special_ids) | set(ends))


def _free_device_memory() -> None:
    """Give back the device memory that earlier stages have left reserved: the server needs it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
