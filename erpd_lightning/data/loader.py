"""Micro-batches of optimiser steps: the same on every rank, and resumable at any of them.

An optimiser step is a set of responses. It is cut into `micro_batches * world_size` micro-batches of similar padded
size, as many on every rank and in every step, so that all ranks run forward and backward equally often. Losses are sums
over tokens divided by `step_tokens`, hence independent of the cut.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..seeds import derive_seed
from .batching import RolloutBatch, RolloutTable, replaced


class Collate(Protocol):
    """Builds a batch; `RolloutTable.batch` with its advantages bound is one."""

    def __call__(
        self,
        rows: Tensor,
        *,
        step_tokens: int,
        step_responses: int,
        last: bool,
    ) -> RolloutBatch: ...


class StepLoader:
    """This rank's micro-batches of one epoch after the other, resumable after any of them.

    The stream depends on the arguments alone. Each `iter()` continues it, where `load_state_dict`
    put it or where the last iterator was left, to the end of the epoch; the one after that starts
    the next epoch. The state counts the micro-batches taken in the epoch and is the same on every
    rank. A `Trainer` gives each of its epochs one of the loader's, also with `limit_train_batches`.

    Args:
        collate: Makes the batch of some store rows.
        lengths: (N,) long, tokens of prompt and response of every row of the store.
        response_lengths: (N,) long, tokens of the response.
        rows: (n,) long, the rows of the store to go through.
        batch_size: Responses per optimiser step, over all ranks; the last step of an epoch may have
            fewer.
        micro_batches: Micro-batches per rank in each step; see `micro_batches_needed`.
        rank: This process, from 0.
        world_size: How many processes there are.
        seed: Seed of the order.
        shuffle: Draw a new order for each epoch. If not, the order is that of `rows`.
    """

    def __init__(
        self,
        collate: Collate,
        lengths: Tensor,
        response_lengths: Tensor,
        rows: Tensor,
        *,
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.collate = collate
        self.lengths = lengths
        self.response_lengths = response_lengths
        self.rows = rows
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = 0
        self._batches = 0

    def __len__(self) -> int:
        """Micro-batches of one epoch on this rank."""
        return -(-len(self.rows) // self.batch_size) * self.micro_batches

    def __iter__(self) -> Iterator[RolloutBatch]:
        # Lightning asks for iterators that it does not use: nothing may change before the first
        # batch is taken.
        steps = plan_steps(len(self.rows), self.batch_size, seed=self.seed, epoch=self._epoch, shuffle=self.shuffle)
        first, done = divmod(self._batches, self.micro_batches)
        for number, chosen in enumerate(steps[first:]):
            for batch in self._micro_batches(self.rows[chosen], done if number == 0 else 0):
                # Before the yield: a checkpoint is saved while the iterator waits there.
                self._batches += 1
                yield batch
        self._epoch, self._batches = self._epoch + 1, 0

    def iterate_once(self) -> Iterator[RolloutBatch]:
        """This rank's share of all rows once, in as many micro-batches on every rank; the state stays as it is."""
        for rows in torch.split(self.rows, self.batch_size):
            yield from self._micro_batches(rows, 0)

    @property
    def sampler(self) -> "StepLoader":
        """Where Lightning looks for `set_epoch`, which it calls before each of its epochs."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, unless that is the epoch in progress."""
        # Lightning drops the loader's state when it resumes between epochs; this is what remains.
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """`{"epoch", "batches"}`: micro-batches taken so far in the epoch."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next `iter()` continue exactly there.

        Raises:
            UserError: the epoch has fewer micro-batches than were taken.
        """
        if not 0 <= state["batches"] <= len(self):
            raise UserError(
                f"the checkpoint was saved after {state['batches']} micro-batches of an epoch that "
                f"has {len(self)} now: resume with the same data, batch size and processes"
            )
        self._epoch, self._batches = state["epoch"], state["batches"]

    def _micro_batches(self, rows: Tensor, start: int) -> Iterator[RolloutBatch]:
        """This rank's micro-batches of the step over `rows`, from number `start` on."""
        parts = partition_step(self.lengths[rows], self.micro_batches * self.world_size)
        step_tokens = int(self.response_lengths[rows].sum())
        for number in range(start, self.micro_batches):
            part = parts[number * self.world_size + self.rank]
            is_dummy = len(part) == 0
            batch = self.collate(
                rows[self.lengths[rows].argmin()][None] if is_dummy else rows[part],
                step_tokens=step_tokens,
                step_responses=len(rows),
                last=number == self.micro_batches - 1,
            )
            if is_dummy:
                batch = replaced(batch, mask=torch.zeros_like(batch.mask), rows=torch.full_like(batch.rows, -1))
            yield batch


def micro_batches(rollouts: RolloutTable, max_tokens: int, rows: Tensor | None = None) -> Iterator[RolloutBatch]:
    """Some rows of a table once, similar lengths together, within `max_tokens` padded tokens each; by default all.

    Each is a step of its own, without advantages: for asking, not for training.
    """
    rows = torch.arange(len(rollouts.lengths)) if rows is None else rows
    lengths = rollouts.lengths[rows]
    for part in partition_step(lengths, micro_batches_needed(lengths, len(rows), max_tokens)):
        yield rollouts.batch(
            rows[part],
            torch.zeros(len(rollouts.lengths)),
            step_tokens=int(rollouts.response_lengths[rows[part]].sum()),
            step_responses=len(part),
            last=True,
        )


def plan_steps(size: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool) -> list[Tensor]:
    """Indices below `size` of each optimiser step of an epoch; the last step may be smaller.

    The order depends on `seed` and `epoch` only: neither on the rank nor on the global random
    state.
    """
    order = torch.arange(size)
    if shuffle:
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        order = torch.randperm(size, generator=generator)
    return list(torch.split(order, batch_size)) if size else []


def partition_step(lengths: Tensor, parts: int) -> list[Tensor]:
    """Cut a step into micro-batches such that the largest padded size is as small as it can be.

    Args:
        lengths: (n,) long, tokens of prompt and response, each at least 1.
        parts: How many micro-batches to make.

    Returns:
        Exactly `parts` groups of indices, together a permutation; each is a run of the indices
        sorted by decreasing length. The padded size of a group is its count times its longest
        length. No cut of any kind has a smaller largest one (runs are no restriction: sorting while
        keeping the groups' counts increases no group's longest length). Groups are empty only where
        there are fewer responses than groups.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    descending = lengths.tolist()
    low, high = max(descending, default=0), len(descending) * max(descending, default=0)
    while low < high:
        bound = (low + high) // 2
        if len(_greedy_cut(descending, bound)) <= parts:
            high = bound
        else:
            low = bound + 1
    counts = _greedy_cut(descending, low)
    while len(counts) < min(parts, len(descending)):
        index = counts.index(max(counts))
        counts[index : index + 1] = [counts[index] - counts[index] // 2, counts[index] // 2]
    return list(torch.split(order, counts + [0] * (parts - len(counts))))


def micro_batches_needed(lengths: Tensor, batch_size: int, max_tokens: int) -> int:
    """Micro-batches, over all ranks, that keep every padded size within `max_tokens` in every step.

    The `batch_size` longest responses are the worst step there can be.

    Args:
        lengths: (n,) long, tokens of prompt and response of all rows that steps are made of.
        batch_size: Responses per optimiser step.
        max_tokens: Largest count times longest length of a micro-batch.

    Raises:
        UserError: one response alone is longer than `max_tokens`.
    """
    longest = lengths.sort(descending=True).values[:batch_size].tolist()
    if longest and longest[0] > max_tokens:
        raise UserError(
            f"max_tokens is {max_tokens}, but the longest prompt with its response has "
            f"{longest[0]} tokens: set max_tokens to at least {longest[0]}"
        )
    return len(_greedy_cut(longest, max_tokens))


def _greedy_cut(descending: list[int], bound: int) -> list[int]:
    """Counts of the fewest runs with count times first length within `bound` (>= all lengths)."""
    counts, start = [], 0
    while start < len(descending):
        count = min(bound // descending[start], len(descending) - start)
        counts.append(count)
        start += count
    return counts
