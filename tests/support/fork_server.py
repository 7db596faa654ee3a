"""The command line in forked children that are killed where a test says so; `Runs` in `runs.py` starts this file.

Importing takes longer than a tiny run, so one process imports everything and forks a child for each run. It reads
a JSON object a line: `argv`, the file `output` for what the child prints, the file `steps` for the optimiser
steps that it trains, the number of `processes`, and `kill`, the fields of a `Kill` or null.

With `processes` above 1 there are as many children of a run, and `kill` and `steps` are the first one's; once it has
failed, the others are killed too. The answer is the exit code, negative for a signal.
"""

import functools
import json
import os
import signal
import sys
from typing import Any

from support.kills import MODULE, Kill, before_call
from support.processes import exit_code, fork, rank_environments


def run(case: dict[str, Any]) -> None:
    """The whole life of a child."""
    output = os.open(case["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if case["kill"] is not None:
        Kill(**case["kill"]).arm()

    def note_step(module: Any, *_: Any) -> None:
        with open(case["steps"], "a") as file:
            print(module.global_step, file=file)

    before_call(f"{MODULE}.training_step", note_step)
    sys.argv = ["erpd_lightning", *case["argv"]]
    from erpd_lightning.cli.main import main

    main()


def start(case: dict[str, Any]) -> list[int]:
    """Run a case in one process or, as `torchrun` starts them, in several; returns their ids."""
    if case["processes"] == 1:
        return [fork(functools.partial(run, case))]
    first, *others = rank_environments(case["processes"])
    other = {**case, "kill": None, "steps": os.devnull}
    return [fork(functools.partial(run, case), first), *(fork(functools.partial(run, other), rank) for rank in others)]


def serve(part_tokens: int | None) -> None:
    """Fork children for each line. Parts of stores of scores may hold another number of tokens than they do."""
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
