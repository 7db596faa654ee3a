"""Steps that hold every response once, their micro-batches, and loaders that are resumed."""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from erpd_lightning.data.batching import RolloutBatch, RolloutTable
from erpd_lightning.data.loader import StepLoader, micro_batches_needed, partition_step, plan_steps
from erpd_lightning.errors import UserError
from support.tables import (
    ROWS,
    TABLE,
    make_batch,
    make_rows,
    make_table,
    same,
)
from support.trainers import make_trainer

# Steps


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1), (0, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_hold_each_index_once(count: int, batch_size: int, shuffle: bool) -> None:
    steps = plan_steps(count, batch_size, seed=0, epoch=0, shuffle=shuffle)
    full, rest = divmod(count, batch_size)
    assert [len(step) for step in steps] == [batch_size] * full + [rest] * (rest > 0)
    flat = [int(i) for step in steps for i in step]
    assert sorted(flat) == list(range(count))
    assert shuffle or flat == list(range(count))


def order(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(plan_steps(50, 50, seed=seed, epoch=epoch, shuffle=True)[0].tolist())


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    pairs = list(itertools.product([-1, 0, 1, 2, 10**12], [0, 1, 2, 12]))
    orders = {pair: order(*pair) for pair in pairs}
    assert len(set(orders.values())) == len(pairs)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert {pair: order(*pair) for pair in pairs} == orders
    torch.set_rng_state(state)
    order(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def padded_sizes(lengths: list[int], groups: list[list[int]]) -> list[int]:
    return [len(group) * max((lengths[i] for i in group), default=0) for group in groups]


def best_cut(lengths: list[int], micro_batches: int) -> int:
    """Smallest largest padded size over all ways to give each response to a micro-batch."""
    best = 10**9
    for choice in itertools.product(range(micro_batches), repeat=len(lengths)):
        groups = [[i for i, c in enumerate(choice) if c == p] for p in range(micro_batches)]
        best = min(best, max(padded_sizes(lengths, groups)))
    return best


CUTS = [
    (torch.randint(1, high, (count,), generator=torch.Generator().manual_seed(seed)), micro_batches)
    for seed, (high, count, micro_batches) in enumerate(itertools.product([3, 8, 100], [1, 3, 5], [1, 2, 3, 4]))
]
# Here a bound that is too large by one is already a worse cut.
CUTS += [(torch.tensor([1, 8, 8, 4, 5]), 3), (torch.tensor([5, 1, 3, 8]), 2)]


@pytest.mark.parametrize(("lengths", "micro_batches"), CUTS)
def test_a_cut_is_the_best_there_is(lengths: Tensor, micro_batches: int) -> None:
    groups = [group.tolist() for group in partition_step(lengths, micro_batches)]
    assert len(groups) == micro_batches
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert max(padded_sizes(lengths.tolist(), groups)) == best_cut(lengths.tolist(), micro_batches)
    assert sum(len(group) > 0 for group in groups) == min(micro_batches, len(lengths))
    in_order = [int(lengths[i]) for group in groups for i in group]
    assert in_order == sorted(lengths.tolist(), reverse=True)


def test_ties_are_cut_in_order() -> None:
    assert [g.tolist() for g in partition_step(torch.tensor([4, 7, 4, 4, 7]), 2)] == [[1, 4], [0, 2, 3]]


def test_a_cut_of_nothing_is_empty() -> None:
    assert [len(group) for group in partition_step(torch.zeros(0, dtype=torch.long), 3)] == [0, 0, 0]


@pytest.mark.parametrize(("lengths", "micro_batches"), CUTS)
def test_as_few_micro_batches_as_fit(lengths: Tensor, micro_batches: int) -> None:
    for budget in {best_cut(lengths.tolist(), micro_batches), int(lengths.max()), 10**6}:
        needed = micro_batches_needed(lengths, len(lengths), budget)
        assert best_cut(lengths.tolist(), needed) <= budget
        assert needed == 1 or best_cut(lengths.tolist(), needed - 1) > budget


def test_only_the_longest_of_a_step_count() -> None:
    lengths = torch.tensor([1, 9, 1, 8, 1, 1])
    assert micro_batches_needed(lengths, 2, 9) == 2
    assert micro_batches_needed(lengths, 2, 18) == 1
    assert micro_batches_needed(lengths, 6, 9) == 3


def test_a_response_longer_than_the_budget_is_named() -> None:
    assert micro_batches_needed(torch.tensor([3, 12, 5]), 1, 12) == 1
    with pytest.raises(UserError, match=r"max_tokens is 11, but .* 12 tokens"):
        micro_batches_needed(torch.tensor([3, 12, 5]), 1, 11)


# The loader


def make_loader(table: RolloutTable, rows: list[int] | None = None, **changes: Any) -> StepLoader:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "micro_batches": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
        "shuffle": True,
        **changes,
    }
    return StepLoader(
        partial(table.batch, advantages=torch.arange(len(table.rewards)) / 2),
        table.lengths,
        table.response_lengths,
        torch.tensor(range(len(table.rewards)) if rows is None else rows),
        **settings,
    )


def stream(loader: StepLoader, epochs: int) -> Iterator[RolloutBatch]:
    """What is left of the first `epochs` epochs, as a plain loop sees it."""
    while loader.state_dict()["epoch"] < epochs:
        yield from loader


SELECTED = [0, 2, 3, 5, 7, 8, 9, 10, 13, 14, 15, 16, 19, 20, 21, 22, 23]  # 17: the last step has 1

WORLDS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize(("world_size", "micro_batches"), WORLDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_comes_once_per_epoch(world_size: int, micro_batches: int, shuffle: bool) -> None:
    loaders = [
        make_loader(
            TABLE,
            SELECTED,
            micro_batches=micro_batches,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        for rank in range(world_size)
    ]
    epochs = []
    for _ in range(3):
        streams = [list(loader) for loader in loaders]
        assert {len(batches) for batches in streams} == {3 * micro_batches}
        assert {len(loader) for loader in loaders} == {3 * micro_batches}
        epochs.append([int(r) for b in itertools.chain(*streams) for r in b.rows if r >= 0])
        assert sorted(epochs[-1]) == SELECTED
    assert (epochs[0] == epochs[1]) is not shuffle


@pytest.mark.parametrize(("world_size", "micro_batches"), WORLDS)
def test_a_step_counts_all_ranks_and_micro_batches(world_size: int, micro_batches: int) -> None:
    streams = [
        list(make_loader(TABLE, SELECTED, micro_batches=micro_batches, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes = []
    for step in range(3):
        batches = [b for s in streams for b in s[step * micro_batches : (step + 1) * micro_batches]]
        rows = [int(row) for batch in batches for row in batch.rows if row >= 0]
        tokens = sum(len(ROWS[row]["response_ids"]) for row in rows)
        assert tokens == sum(int(batch.mask.sum()) for batch in batches)
        assert {batch.step_tokens for batch in batches} == {tokens}
        assert {batch.step_responses for batch in batches} == {len(rows)}
        assert [batch.last for batch in batches] == ([False] * (micro_batches - 1) + [True]) * world_size
        sizes.append(len(rows))
    assert sizes == [8, 8, 1]


def test_a_step_is_the_same_however_it_is_cut() -> None:
    def steps(world_size: int, micro_batches: int) -> list[set[int]]:
        streams = [
            list(make_loader(TABLE, rank=rank, world_size=world_size, micro_batches=micro_batches))
            for rank in range(world_size)
        ]
        found: list[set[int]] = [set() for _ in range(3)]
        for batches in streams:
            for number, batch in enumerate(batches):
                found[number // micro_batches] |= set(batch.rows.tolist()) - {-1}
        return found

    assert all(steps(*world) == steps(1, 1) for world in WORLDS)
    assert [len(step) for step in steps(1, 1)] == [8, 8, 8]


def test_ranks_get_micro_batches_of_similar_length_at_a_time() -> None:
    streams = [list(make_loader(TABLE, batch_size=24, rank=rank, world_size=2, micro_batches=3)) for rank in range(2)]
    micro_batches = [batch.rows for pair in zip(*streams, strict=True) for batch in pair]
    expected = partition_step(TABLE.lengths[torch.cat(micro_batches)], 6)
    assert [TABLE.lengths[rows].tolist() for rows in micro_batches] == [
        TABLE.lengths[torch.cat(micro_batches)][rows].tolist() for rows in expected
    ]


@pytest.mark.parametrize("max_tokens", [10, 11, 20, 40, 10**4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_budget_holds_in_every_step(max_tokens: int, world_size: int) -> None:
    table = make_table(make_rows(60))
    assert int(table.lengths.max()) == 10
    needed = micro_batches_needed(table.lengths, 16, max_tokens)
    largest = 0
    for rank in range(world_size):
        micro_batches = -(-needed // world_size)
        loader = make_loader(table, batch_size=16, micro_batches=micro_batches, rank=rank, world_size=world_size)
        sizes = [batch.input_ids.numel() for batch in stream(loader, 5)]
        assert len(sizes) == 5 * 4 * micro_batches
        largest = max(largest, *sizes)
    assert largest <= max_tokens
    assert needed == 1 or largest > max_tokens // 2


def test_an_empty_micro_batch_is_one_masked_row() -> None:
    rows = [3, 14, 10]
    lengths = TABLE.lengths[rows].tolist()
    assert len(set(lengths)) == 3
    batches = [
        batch for rank in range(2) for batch in make_loader(TABLE, rows, micro_batches=2, rank=rank, world_size=2)
    ]
    assert sorted(batch.rows.tolist() for batch in batches) == [[-1], [3], [10], [14]]
    (dummy,) = [batch for batch in batches if batch.rows.tolist() == [-1]]
    expected = make_batch(TABLE, [rows[lengths.index(min(lengths))]])
    assert expected.mask.any()
    assert not dummy.mask.any()
    assert dummy.mask.shape == expected.mask.shape
    assert torch.equal(dummy.input_ids, expected.input_ids)
    assert torch.equal(dummy.attention_mask, expected.attention_mask)
    assert dummy.step_tokens == sum(int(batch.mask.sum()) for batch in batches)
    assert dummy.step_responses == 3
    assert dummy.last


# Resuming


@pytest.mark.parametrize(("rank", "world_size", "micro_batches"), [(0, 1, 1), (0, 1, 3), (1, 2, 2)])
def test_the_stream_resumes_after_any_batch(rank: int, world_size: int, micro_batches: int) -> None:
    def loader() -> StepLoader:
        return make_loader(TABLE, SELECTED, micro_batches=micro_batches, rank=rank, world_size=world_size)

    whole = list(stream(loader(), 3))
    assert len(whole) == 9 * micro_batches
    for taken in range(6 * micro_batches + 1):
        killed = loader()
        assert len(list(itertools.islice(stream(killed, 3), taken))) == taken
        state = json.loads(json.dumps(killed.state_dict()))
        resumed = loader()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest = list(stream(resumed, 3))
        assert len(rest) == len(whole) - taken
        assert all(same(a, b) for a, b in zip(rest, whole[taken:], strict=True))


def test_the_state_counts_the_batches_taken() -> None:
    loaders = [make_loader(TABLE, SELECTED, rank=rank, world_size=2) for rank in range(2)]
    iterators = [iter(loader) for loader in loaders]
    assert loaders[0].state_dict() == {"epoch": 0, "batches": 0}
    for taken in range(1, 7):
        for iterator in iterators:
            next(iterator)
        states = [loader.state_dict() for loader in loaders]
        assert states == [{"epoch": 0, "batches": taken}] * 2
    assert [next(iterator, None) for iterator in iterators] == [None, None]
    assert loaders[0].state_dict() == {"epoch": 1, "batches": 0}


def test_iterators_that_are_not_used_change_nothing() -> None:
    loader = make_loader(TABLE, SELECTED)
    expected = list(make_loader(TABLE, SELECTED))
    iter(loader)
    iterator = iter(loader)
    iter(loader)
    got = [next(iterator), next(iterator), *loader]
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_a_state_beyond_the_epoch_is_refused() -> None:
    loader = make_loader(TABLE, SELECTED)
    loader.load_state_dict({"epoch": 4, "batches": 6})
    assert loader.state_dict() == {"epoch": 4, "batches": 6}
    with pytest.raises(UserError, match="after 7 micro-batches of an epoch that has 6 now"):
        loader.load_state_dict({"epoch": 0, "batches": 7})


class Recorder(LightningModule):
    """Notes which rows it was given in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: RolloutBatch, index: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.rows.tolist()))
        return self.weight * batch.rewards.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """A checkpoint before the first batch, after each batch and at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[Path, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Recorder)
        path = self.folder / f"{len(self.saved)}.ckpt"
        self.saved[path] = len(pl_module.seen)
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.on_train_start(trainer, pl_module)

    on_train_epoch_end = on_train_start


def fit(*callbacks: Callback, limit: int | None, checkpoint: Path | None = None) -> list[tuple[int, list[int]]]:
    trainer = make_trainer(*callbacks, max_epochs=3, limit_train_batches=limit)
    module = Recorder()
    loader = make_loader(TABLE, SELECTED, micro_batches=1)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore")  # Lightning's, about the CPU and the small number of batches
@pytest.mark.parametrize("limit", [None, 2])
def test_a_trainer_resumes_from_any_checkpoint(tmp_path: Path, limit: int | None) -> None:
    save = SaveEverywhere(tmp_path)
    whole = fit(save, limit=limit)
    batches = limit or 3
    assert [epoch for epoch, _ in whole] == [0] * batches + [1] * batches + [2] * batches
    expected = [batch.rows.tolist() for batch in stream(make_loader(TABLE, SELECTED, micro_batches=1), 3)]
    kept = [rows for i, rows in enumerate(expected) if i % 3 < batches]
    assert [rows for _, rows in whole] == kept
    assert len(save.saved) == 1 + 3 * batches + 3
    for path, taken in save.saved.items():
        assert fit(limit=limit, checkpoint=path) == whole[taken:]
