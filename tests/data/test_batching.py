"""Batches against loops over tokens; every response once; steps that can be cut and resumed."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from erpd_lightning.data.batching import RolloutBatch, RolloutTable, ScoreTable
from erpd_lightning.data.loader import StepLoader, micro_batches_needed, partition_step, plan_steps
from erpd_lightning.data.store import ROLLOUTS, SCORES
from erpd_lightning.errors import UserError
from erpd_lightning.objectives.tilted_policy import LOG_ZERO

POLICIES = ("base", "teacher", "unlearned")


def make_rows(count: int, longest: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    """Rollouts as Python values; the lengths are skewed and some responses are empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, size: int = 1) -> list[int]:
        return torch.randint(high, (size,), generator=generator).tolist()

    rows = []
    for i in range(count):
        prompt, response = 1 + draw(4)[0], min(draw(longest + 1)[0], draw(longest + 1)[0])
        rows.append(
            {
                "group": i // 4,
                "sample": i % 4,
                "prompt_ids": [100 + x for x in draw(50, prompt)],
                "response_ids": [200 + x for x in draw(50, response)],
                "logps": [-1 - x / 8 for x in draw(50, response)],
                "reward": float(draw(2)[0]),
                "finish_reason": "stop",
                "checked": True,
                "prompt": "",
                "response": "",
                "answer": "",
            }
        )
    return rows


def make_scores(rows: list[dict[str, Any]], scored: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Per policy and scored row: per token the support `{id: logp}`, the tail and the sampled."""
    generator = torch.Generator().manual_seed(1)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    # Some are empty, but not the first, which is where the index of padding points.
    supports = {
        row: [sorted({300 + draw(20) for _ in range((4 - i - t) % 5)}) for t, _ in enumerate(rows[row]["response_ids"])]
        for i, row in enumerate(scored)
    }
    return {
        policy: [
            {
                "row": row,
                "support": [{id: -draw(64) / 8 for id in ids} for ids in supports[row]],
                "tail": [-draw(64) / 8 for _ in supports[row]],
                "sampled": [-draw(64) / 8 for _ in supports[row]],
            }
            for row in scored
        ]
        for policy in POLICIES
    }


def rollouts_arrow(rows: list[dict[str, Any]], cut: int = 0) -> pa.Table:
    """The table in two chunks, as a store of several parts gives it."""
    table = pa.Table.from_pylist(rows, schema=ROLLOUTS)
    return pa.concat_tables([table.slice(0, cut), table.slice(cut)])


def scores_arrow(scores: list[dict[str, Any]], order: list[int] | None = None) -> pa.Table:
    columns = [
        {
            "row": score["row"],
            "logps": score["sampled"],
            "support_size": [len(support) for support in score["support"]],
            "support_ids": [id for support in score["support"] for id in support],
            "support_logps": [x for support in score["support"] for x in support.values()],
            "tail_logps": score["tail"],
        }
        for score in scores
    ]
    ordered = columns if order is None else [columns[i] for i in order]
    table = pa.Table.from_pylist(ordered, schema=SCORES)
    return pa.concat_tables([table.slice(0, 2), table.slice(2)])


def make_table(rows: list[dict[str, Any]], scored: list[int] | None = None) -> RolloutTable:
    scores = {} if scored is None else make_scores(rows, scored)
    tables = {name: ScoreTable.from_arrow(scores_arrow(s)) for name, s in scores.items()}
    return RolloutTable.from_arrow(rollouts_arrow(rows, cut=len(rows) // 3), tables)


def make_batch(table: RolloutTable, rows: list[int], **changes: Any) -> RolloutBatch:
    step = {"step_tokens": 7, "step_responses": 5, "last": True, **changes}
    return table.batch(torch.tensor(rows), torch.arange(len(table.rewards)) / 2, **step)


def same(a: RolloutBatch, b: RolloutBatch) -> bool:
    """Equal in every field."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)

    return all(equal(value, getattr(b, name)) for name, value in vars(a).items())


# Batches against loops over tokens

ROWS = make_rows(24)
TABLE = make_table(ROWS)
CHOSEN = [[0], [5, 3, 17], [23, 0, 11, 4, 4], list(range(24))]


@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_batch_holds_the_tokens_of_its_rows(chosen: list[int]) -> None:
    batch = make_batch(make_table(ROWS), chosen)
    length = max(len(ROWS[r]["prompt_ids"] + ROWS[r]["response_ids"]) for r in chosen)
    tokens = max(len(ROWS[r]["response_ids"]) for r in chosen)
    assert batch.input_ids.shape == (len(chosen), length)
    assert batch.response_ids.shape == (len(chosen), tokens)
    for b, row in enumerate(chosen):
        prompt, response = ROWS[row]["prompt_ids"], ROWS[row]["response_ids"]
        for column in range(length):
            inside = column < len(prompt) + len(response)
            assert batch.input_ids[b, column] == ((prompt + response)[column] if inside else 0)
            assert batch.attention_mask[b, column] == inside
        for t in range(tokens):
            inside = t < len(response)
            assert batch.mask[b, t] == inside
            assert batch.response_ids[b, t] == (response[t] if inside else 0)
            assert batch.sampler_logps[b, t] == (ROWS[row]["logps"][t] if inside else 0)
            assert batch.positions[b, t] == (len(prompt) + t - 1 if inside else 0)
        assert batch.rewards[b] == ROWS[row]["reward"]
        assert batch.advantages[b] == row / 2
        assert batch.rows[b] == row


def test_a_position_is_one_before_its_token() -> None:
    batch = make_batch(make_table(ROWS), CHOSEN[-1])
    predicted = batch.input_ids.gather(1, batch.positions + 1)
    assert torch.equal(predicted[batch.mask], batch.response_ids[batch.mask])
    assert int(batch.mask.sum()) == sum(len(row["response_ids"]) for row in ROWS)


def test_a_batch_has_the_types_that_models_take() -> None:
    batch = make_batch(make_table(ROWS, list(range(24))), [1, 2])
    types = {
        "input_ids": torch.long,
        "attention_mask": torch.bool,
        "positions": torch.long,
        "response_ids": torch.long,
        "mask": torch.bool,
        "sampler_logps": torch.float32,
        "rewards": torch.float32,
        "advantages": torch.float32,
        "rows": torch.long,
        "support_ids": torch.long,
    }
    assert {name: getattr(batch, name).dtype for name in types} == types
    assert batch.scores is not None
    assert {scores.dtype for scores in batch.scores.values()} == {torch.float32}


def test_a_batch_passes_on_its_step() -> None:
    batch = make_batch(make_table(ROWS), [1], step_tokens=70, last=False)
    step = (batch.step_tokens, batch.step_responses, batch.last)
    assert step == (70, 5, False)
    assert batch.scores is None
    assert batch.support_ids is None


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("skipped", [set(), {1, 6, 22}])
def test_scores_are_aligned_to_the_tokens(chosen: list[int], skipped: set[int]) -> None:
    scored = [row for row in range(24) if row not in skipped]
    chosen = [row for row in chosen if row not in skipped]
    scores = make_scores(ROWS, scored)
    table = make_table(ROWS, scored)
    batch = make_batch(table, chosen)
    by_row = {p: {s["row"]: s for s in of_policy} for p, of_policy in scores.items()}
    widest = max((len(ids) for r in chosen for ids in by_row["base"][r]["support"]), default=0)
    assert batch.scores is not None
    assert batch.support_ids is not None
    assert batch.scores.keys() == set(POLICIES)
    for policy, (b, row) in itertools.product(POLICIES, enumerate(chosen)):
        got = batch.scores[policy]
        assert got.shape == (*batch.mask.shape, widest + 1)
        assert batch.support_ids.shape == (*batch.mask.shape, widest)
        for t in range(batch.mask.shape[1]):
            inside = t < len(ROWS[row]["response_ids"])
            support = list(by_row[policy][row]["support"][t].items()) if inside else []
            for k in range(widest):
                token, logp = support[k] if k < len(support) else (-1, LOG_ZERO)
                assert batch.support_ids[b, t, k] == token
                assert got[b, t, k] == logp
            assert got[b, t, widest] == (by_row[policy][row]["tail"][t] if inside else 0)


def test_padding_is_a_distribution() -> None:
    batch = make_batch(make_table(ROWS, list(range(24))), CHOSEN[-1])
    assert batch.scores is not None
    assert not batch.mask.all()
    for scores in batch.scores.values():
        assert torch.equal(scores[~batch.mask].logsumexp(-1), torch.zeros(int((~batch.mask).sum())))


@pytest.mark.parametrize("skipped", [set(), {0, 6, 22}])
def test_flat_scores_and_their_rows(skipped: set[int]) -> None:
    scored = [row for row in range(24) if row not in skipped]
    scores = make_scores(ROWS, scored)
    table = make_table(ROWS, scored)
    widest = max(len(support) for s in scores["base"] for support in s["support"])
    assert table.token_rows.tolist() == [r for r in scored for _ in ROWS[r]["response_ids"]]
    for policy, of_policy in scores.items():
        expected = [
            [*support.values(), *[LOG_ZERO] * (widest - len(support)), tail]
            for score in of_policy
            for support, tail in zip(score["support"], score["tail"], strict=True)
        ]
        flat = table.flat_scores(policy)
        assert flat.dtype == torch.float32
        assert flat.tolist() == expected
        sampled = [x for score in of_policy for x in score["sampled"]]
        assert table.scores[policy].logps.tolist() == sampled


def test_token_rows_without_scores_are_those_of_all_tokens() -> None:
    expected = [i for i, row in enumerate(ROWS) for _ in row["response_ids"]]
    assert make_table(ROWS).token_rows.tolist() == expected


def test_lengths() -> None:
    table = make_table(ROWS)
    prompts = [len(row["prompt_ids"]) for row in ROWS]
    responses = [len(row["response_ids"]) for row in ROWS]
    assert 0 in responses
    assert table.prompt_lengths.tolist() == prompts
    assert table.response_lengths.tolist() == responses
    assert table.lengths.tolist() == [p + r for p, r in zip(prompts, responses, strict=True)]
    assert table.rewards.tolist() == [row["reward"] for row in ROWS]
    assert table.groups.tolist() == [row["group"] for row in ROWS]


def test_scores_are_sorted_by_row() -> None:
    scored = [2, 3, 5, 8, 13, 21]
    (of_policy, *_) = make_scores(ROWS, scored).values()
    straight = ScoreTable.from_arrow(scores_arrow(of_policy))
    shuffled = ScoreTable.from_arrow(scores_arrow(of_policy, order=[4, 0, 5, 2, 1, 3]))
    assert shuffled.rows.tolist() == scored
    for field in fields(straight):
        assert torch.equal(getattr(shuffled, field.name), getattr(straight, field.name))


def test_slices_of_tables_are_read_as_they_are() -> None:
    # Arrow keeps the whole table's values behind a slice.
    table = RolloutTable.from_arrow(rollouts_arrow(ROWS).slice(5, 10))
    assert same(make_batch(table, [0, 3, 9]), make_batch(make_table(ROWS[5:15]), [0, 3, 9]))


def test_a_batch_moves_as_a_whole() -> None:
    batch = make_batch(make_table(ROWS, list(range(24))), [1, 2])
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert moved.scores is not None
    tensors += moved.scores.values()
    assert len(tensors) == 10 + len(POLICIES)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.step_tokens == batch.step_tokens
    assert batch.input_ids.device.type == "cpu"
    assert make_batch(make_table(ROWS), [1]).to("meta").scores is None


# Tables that do not fit


def test_a_prompt_without_tokens_is_refused() -> None:
    rows = make_rows(4)
    rows[2]["prompt_ids"] = []
    with pytest.raises(UserError, match="row 2 has a prompt without tokens"):
        make_table(rows)


def test_log_probs_are_one_per_token() -> None:
    rows = make_rows(4)
    rows[3]["logps"] = [*rows[3]["logps"], -1.0]
    with pytest.raises(UserError, match="response_ids and logps differ in length in row 3"):
        make_table(rows)


@pytest.mark.parametrize("column", ["logps", "tail_logps", "support_ids", "support_logps"])
def test_columns_of_scores_fit_each_other(column: str) -> None:
    table = scores_arrow(make_scores(ROWS, [4, 5, 6])["base"])
    lists = table[column].to_pylist()
    lists[1] = [*lists[1], 1]
    index = table.schema.names.index(column)
    table = table.set_column(index, SCORES.field(column), pa.chunked_array([lists], SCORES.types[index]))
    with pytest.raises(UserError, match=f"{column}.* differ in length in row 1"):
        ScoreTable.from_arrow(table)


def test_a_row_is_scored_once() -> None:
    (of_policy, *_) = make_scores(ROWS, [2, 3, 3]).values()
    with pytest.raises(UserError, match="twice"):
        ScoreTable.from_arrow(scores_arrow(of_policy))


def test_a_row_without_scores_is_named() -> None:
    table = make_table(ROWS, [2, 3, 5, 8])
    assert make_batch(table, [8, 2]).rows.tolist() == [8, 2]
    for row in (0, 4, 20):
        with pytest.raises(UserError, match=f"row {row} of the rollouts is missing"):
            make_batch(table, [3, row])


@pytest.mark.parametrize("rows", [make_rows(24, seed=1), ROWS[1:], ROWS[:20]])
def test_scores_of_other_rollouts_are_refused(rows: list[dict[str, Any]]) -> None:
    scores = make_table(ROWS, list(range(24))).scores
    assert replace(make_table(ROWS), scores=scores).scores.keys() == scores.keys()
    with pytest.raises(UserError, match="'base' were made for other rollouts"):
        replace(make_table(rows), scores=scores)


@pytest.mark.parametrize("name", ["rows", "sizes", "support_ids"])
def test_policies_are_scored_on_the_same_rows_and_supports(name: str) -> None:
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(TABLE.response_lengths.tolist()):
        by_length.setdefault(length, []).append(row)
    first, second, *_ = by_length[3]
    scores = make_table(ROWS, [first]).scores
    value = getattr(scores["teacher"], name)
    other = torch.tensor([second]) if name == "rows" else value.flip(0)
    assert not torch.equal(other, value)
    changed = {**scores, "teacher": replace(scores["teacher"], **{name: other})}
    with pytest.raises(UserError, match="'teacher' and 'base' are on different supports"):
        replace(TABLE, scores=changed)


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


def best_cut(lengths: list[int], pieces: int) -> int:
    """Smallest largest padded size over all ways to give each response to a piece."""
    best = 10**9
    for choice in itertools.product(range(pieces), repeat=len(lengths)):
        groups = [[i for i, c in enumerate(choice) if c == p] for p in range(pieces)]
        best = min(best, max(padded_sizes(lengths, groups)))
    return best


CUTS = [
    (torch.randint(1, high, (count,), generator=torch.Generator().manual_seed(seed)), pieces)
    for seed, (high, count, pieces) in enumerate(itertools.product([3, 8, 100], [1, 3, 5], [1, 2, 3, 4]))
]
# Here a bound that is too large by one is already a worse cut.
CUTS += [(torch.tensor([1, 8, 8, 4, 5]), 3), (torch.tensor([5, 1, 3, 8]), 2)]


@pytest.mark.parametrize(("lengths", "pieces"), CUTS)
def test_a_cut_is_the_best_there_is(lengths: Tensor, pieces: int) -> None:
    groups = [group.tolist() for group in partition_step(lengths, pieces)]
    assert len(groups) == pieces
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert max(padded_sizes(lengths.tolist(), groups)) == best_cut(lengths.tolist(), pieces)
    assert sum(len(group) > 0 for group in groups) == min(pieces, len(lengths))
    in_order = [int(lengths[i]) for group in groups for i in group]
    assert in_order == sorted(lengths.tolist(), reverse=True)


def test_ties_are_cut_in_order() -> None:
    assert [g.tolist() for g in partition_step(torch.tensor([4, 7, 4, 4, 7]), 2)] == [[1, 4], [0, 2, 3]]


def test_a_cut_of_nothing_is_empty() -> None:
    assert [len(group) for group in partition_step(torch.zeros(0, dtype=torch.long), 3)] == [0, 0, 0]


@pytest.mark.parametrize(("lengths", "pieces"), CUTS)
def test_as_few_pieces_as_fit(lengths: Tensor, pieces: int) -> None:
    for budget in {best_cut(lengths.tolist(), pieces), int(lengths.max()), 10**6}:
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


@pytest.mark.parametrize(("world_size", "pieces"), WORLDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_comes_once_per_epoch(world_size: int, pieces: int, shuffle: bool) -> None:
    loaders = [
        make_loader(
            TABLE,
            SELECTED,
            micro_batches=pieces,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        for rank in range(world_size)
    ]
    epochs = []
    for _ in range(3):
        streams = [list(loader) for loader in loaders]
        assert {len(batches) for batches in streams} == {3 * pieces}
        assert {len(loader) for loader in loaders} == {3 * pieces}
        epochs.append([int(r) for b in itertools.chain(*streams) for r in b.rows if r >= 0])
        assert sorted(epochs[-1]) == SELECTED
    assert (epochs[0] == epochs[1]) is not shuffle


@pytest.mark.parametrize(("world_size", "pieces"), WORLDS)
def test_a_step_counts_all_ranks_and_micro_batches(world_size: int, pieces: int) -> None:
    streams = [
        list(make_loader(TABLE, SELECTED, micro_batches=pieces, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes = []
    for step in range(3):
        batches = [b for s in streams for b in s[step * pieces : (step + 1) * pieces]]
        rows = [int(row) for batch in batches for row in batch.rows if row >= 0]
        tokens = sum(len(ROWS[row]["response_ids"]) for row in rows)
        assert tokens == sum(int(batch.mask.sum()) for batch in batches)
        assert {batch.step_tokens for batch in batches} == {tokens}
        assert {batch.step_responses for batch in batches} == {len(rows)}
        assert [batch.last for batch in batches] == ([False] * (pieces - 1) + [True]) * world_size
        sizes.append(len(rows))
    assert sizes == [8, 8, 1]


def test_a_step_is_the_same_however_it_is_cut() -> None:
    def steps(world_size: int, pieces: int) -> list[set[int]]:
        streams = [
            list(make_loader(TABLE, rank=rank, world_size=world_size, micro_batches=pieces))
            for rank in range(world_size)
        ]
        found: list[set[int]] = [set() for _ in range(3)]
        for batches in streams:
            for number, batch in enumerate(batches):
                found[number // pieces] |= set(batch.rows.tolist()) - {-1}
        return found

    assert all(steps(*world) == steps(1, 1) for world in WORLDS)
    assert [len(step) for step in steps(1, 1)] == [8, 8, 8]


def test_ranks_get_pieces_of_similar_length_at_a_time() -> None:
    streams = [list(make_loader(TABLE, batch_size=24, rank=rank, world_size=2, micro_batches=3)) for rank in range(2)]
    pieces = [batch.rows for pair in zip(*streams, strict=True) for batch in pair]
    expected = partition_step(TABLE.lengths[torch.cat(pieces)], 6)
    assert [TABLE.lengths[piece].tolist() for piece in pieces] == [
        TABLE.lengths[torch.cat(pieces)][piece].tolist() for piece in expected
    ]


@pytest.mark.parametrize("max_tokens", [10, 11, 20, 40, 10**4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_budget_holds_in_every_step(max_tokens: int, world_size: int) -> None:
    table = make_table(make_rows(60))
    assert int(table.lengths.max()) == 10
    needed = micro_batches_needed(table.lengths, 16, max_tokens)
    largest = 0
    for rank in range(world_size):
        pieces = -(-needed // world_size)
        loader = make_loader(table, batch_size=16, micro_batches=pieces, rank=rank, world_size=world_size)
        sizes = [batch.input_ids.numel() for batch in stream(loader, 5)]
        assert len(sizes) == 5 * 4 * pieces
        largest = max(largest, *sizes)
    assert largest <= max_tokens
    assert needed == 1 or largest > max_tokens // 2


def test_an_empty_piece_is_one_masked_row() -> None:
    rows = [3, 14, 10]
    lengths = TABLE.lengths[rows].tolist()
    assert len(set(lengths)) == 3
    batches = [
        batch for rank in range(2) for batch in make_loader(TABLE, rows, micro_batches=2, rank=rank, world_size=2)
    ]
    assert sorted(batch.rows.tolist() for batch in batches) == [[-1], [3], [10], [14]]
    (filler,) = [batch for batch in batches if batch.rows.tolist() == [-1]]
    expected = make_batch(TABLE, [rows[lengths.index(min(lengths))]])
    assert expected.mask.any()
    assert not filler.mask.any()
    assert filler.mask.shape == expected.mask.shape
    assert torch.equal(filler.input_ids, expected.input_ids)
    assert torch.equal(filler.attention_mask, expected.attention_mask)
    assert filler.step_tokens == sum(int(batch.mask.sum()) for batch in batches)
    assert filler.step_responses == 3
    assert filler.last


# Resuming


@pytest.mark.parametrize(("rank", "world_size", "pieces"), [(0, 1, 1), (0, 1, 3), (1, 2, 2)])
def test_the_stream_resumes_after_any_batch(rank: int, world_size: int, pieces: int) -> None:
    def loader() -> StepLoader:
        return make_loader(TABLE, SELECTED, micro_batches=pieces, rank=rank, world_size=world_size)

    whole = list(stream(loader(), 3))
    assert len(whole) == 9 * pieces
    for taken in range(6 * pieces + 1):
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
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=limit,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
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
