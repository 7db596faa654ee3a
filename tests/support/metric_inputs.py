"""Clusters, log-ratios and answers that metrics are given, and how their results are compared."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from erpd_lightning.metrics import (
    ImportanceStatistics,
    ImportanceSums,
    importance_statistics,
    importance_sums,
)

Floats = NDArray[np.float64]


def draw_clusters(seed: int, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Numbers of tokens, and sums over them that vary much more between clusters than within."""
    rng = np.random.default_rng(seed)
    y = rng.integers(5, 60, shape).astype(np.float64)
    x = y * rng.gamma(2.0, 0.02, shape) + 0.01 * rng.standard_normal(shape)
    return x, y


INTERVAL, TAIL = (0.5, 2.0), math.e


def row(values: Any) -> Tensor:
    """(1, T) float64."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(1, -1)


def sums_of(log_ratios: Tensor, mask: Tensor | None = None, tail: float = TAIL) -> ImportanceSums:
    mask = torch.ones_like(log_ratios, dtype=torch.bool) if mask is None else mask
    return importance_sums(log_ratios, mask, INTERVAL, tail)


def statistics_of(log_ratios: Tensor, mask: Tensor | None = None, tail: float = TAIL) -> ImportanceStatistics:
    return importance_statistics(sums_of(log_ratios, mask, tail))


@dataclass(frozen=True)
class Data:
    """Twelve prompts, and one to four responses to each; two rows without tokens, of prompt -1, are dummies."""

    correct: Tensor
    samples: Tensor
    x: Tensor
    y: Tensor
    prompts: Tensor
    mask: Tensor
    log_ratios: Tensor

    def of(self, first: int, last: int) -> "Data":
        """The data of some of the prompts, with the dummy rows."""
        rows = (self.prompts >= first) & (self.prompts < last) | (self.prompts < 0)
        by_prompt = (value[first:last] for value in (self.correct, self.samples, self.x, self.y))
        return Data(*by_prompt, *(value[rows] for value in (self.prompts, self.mask, self.log_ratios)))


PROMPTS = 12


def make_data() -> Data:
    rng = np.random.default_rng(4)
    x, y = draw_clusters(3, (PROMPTS,))
    counts = [1, 4, 2, 3, 4, 1, 3, 2, 4, 2, 3, 4]
    prompts = np.concatenate([np.repeat(np.arange(PROMPTS), counts), [-1, -1]])
    rng.shuffle(prompts)
    rows, tokens = len(prompts), 5
    lengths = np.where(prompts < 0, 0, rng.integers(1, tokens + 1, rows))
    mask = np.arange(tokens) < lengths[:, None]
    log_ratios = rng.normal(size=(rows, tokens))
    for prompt, extreme in ((0, 200.0), (1, -200.0), (11, 201.0)):
        log_ratios[np.flatnonzero(prompts == prompt)[0], 0] = extreme
    log_ratios[~mask] = np.nan
    arrays = [
        np.array([0, 4, 1, 2, 3, 8, 1, 2, 0, 5, 4, 1]),
        np.array([4, 4, 5, 6, 8, 8, 4, 5, 6, 7, 8, 9]),
        x,
        y,
        prompts,
        mask,
        log_ratios,
    ]
    return Data(*map(torch.from_numpy, arrays))


def flat(result: Tensor | tuple[Tensor, ...]) -> list[float]:
    return [each.item() for each in (result if isinstance(result, tuple) else (result,))]


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-11)
