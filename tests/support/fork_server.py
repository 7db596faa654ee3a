"""The command line in forked children that are killed where a test says so; `test_resume` starts it.

Importing takes longer than a tiny run, so one process imports everything and forks a child for each run. It reads
a JSON object a line: `argv`, the file `output` for what the child prints, the file `steps` for the optimiser
steps that it trains, and `kill`, which is null or one of

- `{"event": NAME, "path": PATTERN, "count": N}`: just before the N-th audit event of that name (`open`,
  `os.rename`, ...) one of whose arguments the pattern is found in; with `"after": true` at the event that follows;
- `{"call": "module:Class.method", "count": N}`: just before the N-th call.

With `processes` above 1 there are as many children of a run, and `kill` and `steps` are the first one's; once it has
failed, the others are killed too. The answer is the exit code, negative for a signal.
"""

import functools
import importlib
import json
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def kill_self() -> None:
    """No `finally`, no `atexit`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_event(name: str, pattern: str, count: int, after: bool) -> None:
    """Watch what Python reports of itself (`sys.addaudithook`)."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.kill":  # Its own.
            return
        if seen == count:
            kill_self()
        if event == name and any(re.search(pattern, str(argument)) for argument in arguments):
            seen += 1
            if seen == count and not after:
                kill_self()

    sys.addaudithook(watch)


def before_call(target: str, act: Callable[..., None]) -> None:
    """Run `act` with the arguments of every call of a method, first."""
    module, _, path = target.partition(":")
    owner, name = path.split(".")
    cls = getattr(importlib.import_module(module), owner)
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return original(*args, **kwargs)

    setattr(cls, name, wrapped)


def kill_at_call(target: str, count: int) -> None:
    """Count calls."""
    left = count

    def act(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            kill_self()

    before_call(target, act)


def run(case: dict[str, Any]) -> None:
    """The whole life of a child."""
    output = os.open(case["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    kill = case["kill"]
    if kill is None:
        pass
    elif "event" in kill:
        kill_at_event(kill["event"], kill["path"], kill["count"], kill.get("after", False))
    else:
        kill_at_call(kill["call"], kill["count"])

    def note_step(module: Any, *_: Any) -> None:
        with open(case["steps"], "a") as file:
            print(module.global_step, file=file)

    before_call("erpd_lightning.modules.training:TrainingModule.training_step", note_step)
    sys.argv = ["erpd_lightning", *case["argv"]]
    from erpd_lightning.cli.main import main

    main()


def fork(case: dict[str, Any], environment: dict[str, str]) -> int:
    """Run a case in a child; returns its process id."""
    child = os.fork()
    if child != 0:
        return child
    code = 1
    signal.alarm(300)  # A rank that waits for ever ends by this signal.
    try:
        os.environ.update(environment)
        run(case)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child to end."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def meeting_place() -> dict[str, str]:
    """What the processes of a group find one another by."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}


def start(case: dict[str, Any]) -> list[int]:
    """Run a case in one process or, as `torchrun` starts them, in several; returns their ids."""
    if case["processes"] == 1:
        return [fork(case, {})]
    place = meeting_place()
    first = fork(case, {**place, "LOCAL_RANK": "0"})
    other = {**case, "kill": None, "steps": os.devnull}
    return [first, *(fork(other, {**place, "LOCAL_RANK": str(rank)}) for rank in range(1, case["processes"]))]


def serve(part_tokens: int | None) -> None:
    """Fork children for each line. Parts of stores of scores may hold another number of tokens than they do."""
    import peft  # noqa: F401
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import erpd_lightning.cli.main
    import erpd_lightning.data.predict_data

    torch.set_num_threads(1)
    if part_tokens is not None:
        erpd_lightning.data.predict_data.PART_TOKENS = part_tokens
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        first, *others = start(json.loads(line))
        code = exit_code(first)
        for child in others:
            if code != 0:
                os.kill(child, signal.SIGKILL)
            other = exit_code(child)
            code = code or other
        print(code, file=answers, flush=True)
    os._exit(0)  # Leaving in order takes seconds.


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else None)
