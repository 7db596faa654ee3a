"""Memory that a rollout store takes as it grows: written part by part, and read back as a stream.

    python benchmarks/store_memory.py --prompts 1000 --samples 16 --tokens 4096

Prints the peak of the process above what it had after its imports, in MB, for writing and for reading, each in a
process of its own, and checks what was read.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from erpd_lightning.data.store import ROLLOUTS, Store, StoreWriter

PROMPT_TOKENS = 128
PROMPTS_PER_PART = 16
CHARACTERS_PER_TOKEN = 4


def peak_mb() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def part(first: int, prompts: int, samples: int, tokens: int) -> dict[str, list[Any]]:
    """Rollouts of some prompts as a sampler gives them, in lists; ids and log-probs that hardly compress."""
    rng = np.random.default_rng(first)
    rows = prompts * samples
    text = "".join(map(chr, rng.integers(97, 123, tokens * CHARACTERS_PER_TOKEN)))
    return {
        "group": [first + row // samples for row in range(rows)],
        "sample": [row % samples for row in range(rows)],
        "prompt_ids": [rng.integers(0, 150_000, PROMPT_TOKENS).tolist() for _ in range(rows)],
        "response_ids": [rng.integers(0, 150_000, tokens).tolist() for _ in range(rows)],
        "logps": [(-rng.exponential(size=tokens)).tolist() for _ in range(rows)],
        "temperature": [1.0] * rows,
        "reward": [float(row % 2) for row in range(rows)],
        "finish_reason": ["stop"] * rows,
        "checked": [True] * rows,
        "prompt": [text[: PROMPT_TOKENS * CHARACTERS_PER_TOKEN]] * rows,
        "response": [text[row:] + text[:row] for row in range(rows)],
        "answer": ["7"] * rows,
    }


def write(path: Path, prompts: int, samples: int, tokens: int) -> None:
    """Write a store of that many rollouts, part by part."""
    writer = StoreWriter(path, ROLLOUTS, {})
    starts = range(0, prompts, PROMPTS_PER_PART)
    for index, first in enumerate(starts):
        writer.write_part(index, part(first, min(PROMPTS_PER_PART, prompts - first), samples, tokens))
    writer.finish(len(starts))


def read(path: Path, prompts: int, samples: int, tokens: int) -> None:
    """Read all columns of the store as a stream, and check how much there was."""
    store = Store.open(path)
    found = rows = 0
    for batch in store.batches(rows=256):
        rows += batch.num_rows
        found += pc.sum(pc.list_value_length(batch["response_ids"])).as_py()
    assert (rows, found) == (prompts * samples, prompts * samples * tokens)


def main() -> None:
    """Measure; with `--act` be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--act", choices=["write", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = given.prompts, given.samples, given.tokens
    if given.act:
        before, began = peak_mb(), time.perf_counter()
        {"write": write, "read": read}[given.act](given.path, *size)
        print(json.dumps({"above": peak_mb() - before, "seconds": time.perf_counter() - began}))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        for act in ("write", "read"):
            command = [sys.executable, __file__, *sys.argv[1:], "--act", act, "--path", str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{act}: {found['above']:.0f} MB above the start, {found['seconds']:.0f} s")
        print(f"on disk: {sum(file.stat().st_size for file in path.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
