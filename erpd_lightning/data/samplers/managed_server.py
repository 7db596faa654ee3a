"""A server that a run starts on a policy, and ends with all that it has started."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import InvalidArgument
from . import supervisor

GRACE_SECONDS = 10.0
"""How long a server may take to end before it is killed."""

LOOK_SECONDS = 0.2
PLACES = ("{policy}", "{port}")

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
"""By which a server would take itself for one of the run's processes."""


def check_command(command: str) -> None:
    """Refuse a command that cannot serve the policy of a round.

    Raises:
        InvalidArgument: If it cannot be split into arguments, or does not say where policy and port come.
    """
    example = "such as vllm serve {policy} --port {port} --logprobs-mode processed_logprobs"
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise InvalidArgument("command", f"is {command!r}, which cannot be split into arguments: {error}") from None
    if missing := [place for place in PLACES if not any(place in part for part in parts)]:
        raise InvalidArgument(
            "command", f"is {command!r}, without {' and '.join(missing)}: it must have both, {example}"
        )


class ManagedServer:
    """A server in processes of its own.

    It ends with `stop`, and when this process ends in whatever way: see `supervisor`.

    Args:
        command: Command line, not run by a shell, with `{policy}` and `{port}` where they come.
        policy: Folder or hub name of the policy.
        log: File that its output is added to.
        device: The only CUDA device that it sees, by its number among those that this process sees; None for all.
    """

    def __init__(self, command: str, policy: str | Path, log: Path, device: int | None = None) -> None:
        self.command = command
        self.policy = policy
        self.log = log
        self.device = device
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether its processes are there."""
        return self._process is not None and self._process.poll() is None

    def start(self, answers: Callable[[str], bool], seconds: float) -> None:
        """Start it on a free port and wait until it answers.

        Args:
            answers: Whether a server at a URL is ready.
            seconds: Longest wait.

        Raises:
            InvalidArgument: If it ends or does not answer in time: the message has the last line of its log.
        """
        self.port = _free_port()
        places = {"{policy}": str(self.policy), "{port}": str(self.port)}
        command = [_filled(part, places) for part in shlex.split(self.command)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, str(os.getpid()), str(GRACE_SECONDS), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        limit = time.monotonic() + seconds
        try:
            while not answers(self.url):
                if (code := self._process.poll()) is not None:
                    raise _failed(f"that ended with exit code {code} before it answered{self._last()}")
                if time.monotonic() > limit:
                    raise _failed(f"that did not answer within {seconds:g} seconds (start_timeout){self._last()}")
                time.sleep(LOOK_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and all that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        if self.device is not None:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = visible[self.device] if visible else str(self.device)
        return environment

    def _last(self) -> str:
        """The last line of the log, as the end of a message."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4096))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        line = lines[-1].strip() if lines and not lines[-1].startswith("$ ") else "it wrote nothing"
        return f": {line[:160]} ({self.log})"


def _failed(problem: str) -> InvalidArgument:
    return InvalidArgument("sampler.command", f"started a server {problem}")


def _filled(part: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        part = part.replace(place, value)
    return part


def _free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
