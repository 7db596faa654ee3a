"""Every test runs on one thread and from the same seeds."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; child processes inherit it

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from support.runs import Runs

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of the command line; the process that they are forked from starts once, and holds no state of theirs."""
    server = Runs(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
