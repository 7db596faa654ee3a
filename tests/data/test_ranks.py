"""What processes that run together tell one another."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from erpd_lightning.data.ranks import gathered, started_ranks
from support.processes import fork_ranks, start_ranks


def see(folder: Path, processes: int) -> dict[str, Any]:
    """What a process sees before and after it meets the others."""
    rank = int(os.environ["LOCAL_RANK"])
    alone = started_ranks(), gathered(rank)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    together = started_ranks(), gathered({"rank": rank, "rows": [rank] * rank})
    return {"alone": alone, "together": together}


def test_processes_have_what_each_of_them_has(tmp_path: Path) -> None:
    seen = start_ranks(__file__, tmp_path)
    for rank in range(2):
        assert seen[rank]["alone"] == ((0, 1), [rank])
        assert seen[rank]["together"] == ((rank, 2), [{"rank": 0, "rows": []}, {"rank": 1, "rows": [1]}])


if __name__ == "__main__":
    sys.exit(fork_ranks(see, Path(sys.argv[1])))
