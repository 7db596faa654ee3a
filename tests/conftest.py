"""Every test runs on one thread and from the same seeds."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; child processes inherit it

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
