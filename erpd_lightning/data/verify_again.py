"""Another verdict on stored rollouts, without sampling them again."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..text import visible
from .prompt_batches import verified_texts
from .reward_parts import parts_column
from .settings import settings_of
from .store import ROLLOUTS, Store, StoreWriter
from .verifiers import Verifier, take_verdicts

VERDICT_COLUMNS = ("reward", "checked", "rewards")
SHOWN_COLUMNS = ("group", "sample", "answer", "response")

SHOWN_CHARACTERS = 60
"""How much of the end of a response is shown beside its verdicts."""


@dataclass(frozen=True)
class Change:
    """A verdict that changed.

    Attributes:
        group: The response's prompt.
        sample: Which response to it.
        before: Its reward; None where it could not be checked.
        after: Its reward now.
        answer: The reference answer.
        response: The end of the response.
    """

    group: int
    sample: int
    before: float | None
    after: float | None
    answer: str
    response: str

    @property
    def kind(self) -> str:
        """What happened to the reward, in a word or two."""
        if self.before is None or self.after is None:
            return "now checked" if self.before is None else "no longer checked"
        return "higher" if self.after > self.before else "lower"

    def __str__(self) -> str:
        rewards = ["unchecked" if reward is None else f"{reward:g}" for reward in (self.before, self.after)]
        response = visible(self.response)
        return (
            f"{self.group}.{self.sample}  {' -> '.join(rewards)}  answer {visible(self.answer)}  response …{response}"
        )


@dataclass(frozen=True)
class Changes:
    """How the verdicts of two stores of the same responses differ.

    Attributes:
        store: The second of them.
        rows: Responses of each.
        changes: The verdicts that changed, in the order of the rows.
    """

    store: Store
    rows: int
    changes: list[Change]

    def summary(self) -> str:
        """How many verdicts changed, and how, in a line."""
        kinds = Counter(change.kind for change in self.changes)
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return f"{len(self.changes)} of {self.rows} verdicts changed" + (f": {counted}" if counted else "")


def verify_again(store: str | Path | Store, verifier: Verifier, output: str | Path, tokenizer: Any = None) -> Changes:
    """Verify the responses of a finished rollout store with another verifier, into a store of its own.

    The responses, their log-probs and all that was noted of how they were drawn stay as they are; the new store's
    metadata name the verifier, and the store that it was made from. Killed at any moment and called again it goes on
    with the parts that are missing.

    Args:
        store: The rollouts, or their directory.
        verifier: The verifier.
        output: Directory of the new store.
        tokenizer: The policy's tokenizer, with which a verifier is shown what it is shown while sampling: special
            tokens inside a response too. None for the stored texts, which are without.

    Returns:
        What changed, and the new store.

    Raises:
        UserError: If the store is none of rollouts or is damaged, `output` is the store itself or holds another one,
            or the verifier cannot check.
    """
    before = store if isinstance(store, Store) else Store.open(store)
    if before.schema != "rollouts":
        raise UserError(f"{before.path} is a store of {before.schema}: only rollouts can be verified")
    if Path(output).resolve() == before.path.resolve():
        raise UserError(f"{output} is the store itself, which never changes: name another directory for the output")
    metadata = {**before.metadata, "verifier": settings_of(verifier), "verified_again": before.fingerprint}
    writer = StoreWriter(output, ROLLOUTS, metadata)
    if not Store.exists(output):
        verifier.start()
        for index, table in enumerate(_tables(before)):
            if not writer.has_part(index):
                writer.write_part(index, _with_verdicts(table, verifier, tokenizer))
    after = writer.finish(len(before.parts))
    pairs = zip(_tables(before), _tables(after), strict=True)
    return Changes(after, after.rows, [change for pair in pairs for change in _changes(*pair)])


def _tables(store: Store) -> Iterator[pa.Table]:
    """The rows part by part: all at once they may not fit in memory."""
    for part in store.parts:
        yield pq.ParquetFile(store.path / part["name"]).read()


def _with_verdicts(table: pa.Table, verifier: Verifier, tokenizer: Any) -> pa.Table:
    """The same rows with the verdicts of a verifier."""
    texts = table["response"].to_pylist()
    if tokenizer is not None:
        texts = verified_texts(tokenizer, table["response_ids"].to_pylist(), table["finish_reason"].to_pylist())
    verdicts = take_verdicts(verifier, table["prompt"].to_pylist(), texts, table["answer"].to_pylist())
    columns = {name: table[name] for name in table.column_names if name not in VERDICT_COLUMNS}
    columns["reward"] = pa.array([reward or 0.0 for reward in verdicts.rewards], pa.float32())
    columns["checked"] = pa.array([reward is not None for reward in verdicts.rewards], pa.bool_())
    columns["rewards"] = pa.array(parts_column(verdicts.parts, len(table)), pa.string())
    return pa.table(columns)


def _changes(before: pa.Table, after: pa.Table) -> Iterator[Change]:
    for row, (old, new) in enumerate(zip(_rewards(before), _rewards(after), strict=True)):
        if old != new:
            group, sample, answer, response = (after[name][row].as_py() for name in SHOWN_COLUMNS)
            yield Change(group, sample, old, new, answer, response[-SHOWN_CHARACTERS:])


def _rewards(table: pa.Table) -> list[float | None]:
    pairs = zip(table["reward"].to_pylist(), table["checked"].to_pylist(), strict=True)
    return [reward if checked else None for reward, checked in pairs]
