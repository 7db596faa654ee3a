"""The column `rewards` of a rollout store: the rewards that a response's reward is made of, as JSON by their names."""

import json
from collections.abc import Mapping, Sequence

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
