"""Store of the first responses of an evaluation, token by token: `samples.parquet`, which the report reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError, first_line
from ..files import atomic_write

SAMPLES_FILE = "samples.parquet"

KEPT_PROMPTS = 32
"""Number of held-out prompts whose responses are kept: enough to see where KL is spent, and more than anybody reads."""

KEPT_TOKENS = 2**18
"""Greatest number of response tokens that are kept, some 4 MB: long responses to a few prompts would fill a disk."""

SAMPLES = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "group": pa.int64(),
            "sample": pa.int32(),
            "prompt": pa.string(),
            "response": pa.string(),
            "answer": pa.string(),
            "reward": pa.float32(),
            "checked": pa.bool_(),
            "finish_reason": pa.string(),
            "token_ids": pa.list_(pa.int32()),
            "token_texts": pa.list_(pa.string()),
            "special": pa.list_(pa.bool_()),
            "kls": pa.list_(pa.float32()),
        }.items()
    ]
)
"""Schema with one row per response, as in `ROLLOUTS`. The last four columns have one entry per response token: its id,
its text, whether it is one of the tokenizer's special tokens, and the KL to the round's base policy of the distribution
that it was drawn from (nats, exact over the vocabulary)."""


def kept_rows(table: pa.Table) -> pa.Table:
    """Responses to keep, of a table of the `ROLLOUTS` schema that is in the order of its prompts.

    The one that takes more tokens than are kept is among them: where tables are put together, nothing behind it counts.
    """
    table = table.filter(pc.less(table["group"], KEPT_PROMPTS))
    lengths = pc.list_value_length(table["response_ids"]).to_numpy()
    return table.slice(0, int((np.cumsum(lengths) - lengths <= KEPT_TOKENS).sum()))


def sample_table(table: pa.Table, kls: Sequence[Sequence[float]], tokenizer: Any) -> pa.Table:
    """Table of responses, of the `SAMPLES` schema.

    Args:
        table: The responses, of the `ROLLOUTS` schema.
        kls: KL at each token of each response, in nats.
        tokenizer: Tokenizer of the policy.
    """
    ids: list[list[int]] = table["response_ids"].to_pylist()
    special = set(tokenizer.all_special_ids)
    cache: dict[tuple[int, ...], str] = {}
    columns = {
        **{name: table[name] for name in SAMPLES.names if name in table.column_names},
        "token_ids": ids,
        "token_texts": [token_texts(tokenizer, row, cache) for row in ids],
        "special": [[token in special for token in row] for row in ids],
        "kls": kls,
    }
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def write_samples(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write the responses that several ranks kept, each once and within the bounds, in the order of the prompts."""
    table = pa.concat_tables([SAMPLES.empty_table(), *tables])
    table = table.sort_by([("group", "ascending"), ("sample", "ascending")])
    keys = list(zip(table["group"].to_pylist(), table["sample"].to_pylist(), strict=True))
    # Ranks that share a model's tensors have the same responses.
    is_new = [i == 0 or key != keys[i - 1] for i, key in enumerate(keys)]
    table = table.filter(pa.array(is_new, pa.bool_()))
    tokens = np.cumsum(pc.list_value_length(table["token_ids"]).to_numpy())
    table = table.slice(0, int((tokens <= KEPT_TOKENS).sum()))
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, sink.getvalue())


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of a `samples.parquet`, by the names of `SAMPLES`.

    Raises:
        UserError: If it is damaged or something else.
    """
    rows: list[dict[str, Any]] = _read(path).to_pylist()
    return rows


def copy_samples_of_base(source: Path, target: Path) -> None:
    """Copy the samples of a policy that has become the base policy, to which its KL is 0.

    Raises:
        UserError: If the source is damaged or something else.
    """
    table = _read(source)
    kls = [[0.0] * len(row) for row in table["kls"].to_pylist()]
    column = table.schema.get_field_index("kls")
    write_samples(target, [table.set_column(column, SAMPLES.field("kls"), pa.array(kls, SAMPLES.field("kls").type))])


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=SAMPLES.names).cast(SAMPLES)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as the samples of an evaluation: {first_line(error)}") from error


def token_texts(tokenizer: Any, ids: Sequence[int], cache: dict[tuple[int, ...], str] | None = None) -> list[str]:
    """Text of each token after the token before it: alone, many tokenizers drop the space that begins a word.

    Args:
        tokenizer: The policy's tokenizer.
        ids: Token ids of a response.
        cache: Text of one and of two tokens, filled for other responses.
    """
    cache = {} if cache is None else cache

    def decoded(*tokens: int) -> str:
        if tokens not in cache:
            cache[tokens] = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cache[tokens]

    texts = [decoded(token) for token in ids]
    for i in range(1, len(ids)):
        both, before = decoded(ids[i - 1], ids[i]), decoded(ids[i - 1])
        if both.startswith(before):
            texts[i] = both.removeprefix(before)
    return texts
