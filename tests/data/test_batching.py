"""Tables and batches against loops over tokens, and tables that do not fit one another."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from erpd_lightning.data.batching import RolloutTable, ScoreTable
from erpd_lightning.data.store import SCORES
from erpd_lightning.errors import UserError
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support.tables import (
    POLICIES,
    ROWS,
    TABLE,
    make_batch,
    make_rows,
    make_scores,
    make_table,
    rollouts_arrow,
    same,
    scores_arrow,
)

# Batches against loops over tokens

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
    assert len(tensors) == 11 + len(POLICIES)
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
