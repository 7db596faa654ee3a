"""Tables of made-up rollouts and scores, and the batches that are cut from them."""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from erpd_lightning.data.batching import RolloutBatch, RolloutTable, ScoreTable
from erpd_lightning.data.store import ROLLOUTS, SCORES
from support.policies import WITHOUT_TEXT

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
                "temperature": 0.7,
                "reward": float(draw(2)[0]),
                **WITHOUT_TEXT,
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


ROWS = make_rows(24)

TABLE = make_table(ROWS)
