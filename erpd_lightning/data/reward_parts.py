"""The column `rewards` of a rollout store: the rewards that a response's reward is made of, as JSON by their names."""

import json
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa


def parts_column(parts: Mapping[str, Sequence[float | None]], responses: int) -> list[str]:
    """The column's values.

    Args:
        parts: The rewards of all responses by name; None for what could not be checked.
        responses: How many responses there are.
    """
    return [
        json.dumps({name: rewards[row] for name, rewards in parts.items()}, ensure_ascii=False)
        for row in range(responses)
    ]


def read_parts(table: pa.Table) -> dict[str, list[float | None]]:
    """The rewards of all responses by name, from a table of the `ROLLOUTS` schema; a name that a row lacks is None."""
    rows = [json.loads(text) for text in table["rewards"].to_pylist()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def mean_parts(tables: Iterable[pa.Table]) -> dict[str, float | None]:
    """The mean of each of the rewards that rewards are made of; None for one that was never checked."""
    sums: dict[str, tuple[float, int]] = {}
    for table in tables:
        for name, rewards in read_parts(table).items():
            total, count = sums.get(name, (0.0, 0))
            checked = [reward for reward in rewards if reward is not None]
            sums[name] = (total + sum(checked), count + len(checked))
    return {name: total / count if count else None for name, (total, count) in sums.items()}
