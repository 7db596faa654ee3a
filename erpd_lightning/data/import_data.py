"""A prediction that makes a rollout store of responses that were generated elsewhere.

They are tokenised with the policy's tokenizer, or come as token ids, scored by the policy at a temperature, and
verified. Scores that came with them are kept beside, and where the verifier disagrees is listed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..errors import InvalidArgument, UserError
from ..files import atomic_write
from ..models.generation import eos_token_ids
from .batching import RolloutTable
from .import_rows import StoreRows
from .imports import Imported, ImportedRows, import_fingerprint, is_token_ids
from .loader import micro_batches
from .predict_data import BatchList, PredictToStore
from .prompt_batches import PromptBatch, PromptBatcher
from .prompts import Prompt
from .rescoring import LogpsPart
from .samplers import Response
from .store import RECORDED, ROLLOUTS, Store, StoreWriter
from .tokenize import tokenize

RECORDED_FOLDER = "recorded"
"""Folder of the recorded scores in that of the rollouts."""

DISAGREEMENTS = "disagreements.jsonl"
"""File in the folder of the rollouts that lists where recorded score and verifier disagree."""


class ImportData(PredictToStore):
    """A data module for `Trainer.predict` that makes a rollout store of responses from elsewhere.

    The policy gives the log-probs of those that come without.

    Args:
        imported: The responses.
        batcher: Has the policy's tokenizer, the verifier, and the sampler whose temperature they are scored at.
        path: Directory of the store.
        settings: All that the rows depend on, apart from the policy and the responses.
        on_finish: Called when the store is finished.
    """

    def __init__(
        self,
        imported: ImportedRows,
        batcher: PromptBatcher,
        path: Path,
        settings: dict[str, Any],
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(path, ROLLOUTS, {"imported": import_fingerprint(imported.source), **settings}, on_finish)
        self.imported = imported
        self.batcher = batcher
        self._ends = eos_token_ids(batcher.tokenizer)

    def predict_dataloader(self) -> BatchList:
        """See `PredictToStore`.

        Raises:
            UserError: If the source is a store of another policy's rollouts.
        """
        rows = self.imported.rows
        if isinstance(rows, StoreRows) and self._policy is not None:
            sampled_by = rows.store.metadata.get("policy")
            if sampled_by != self._policy.fingerprint:
                raise UserError(
                    f"{rows.name} was sampled from another policy than {self._policy.policy_path}; give its "
                    "part-*.parquet as a data set, if its responses are to be imported as anybody's"
                )
            drawn_at, temperature = rows.read(0, 1)[0]["temperature"], self.batcher.sampler.temperature
            if drawn_at != temperature:
                raise InvalidArgument(
                    "sampler.temperature", f"is {temperature}, but {rows.name} was sampled at {drawn_at}: give the same"
                )
        return super().predict_dataloader()

    def part_count(self) -> int:
        """See `PredictToStore`."""
        return self.imported.part_count

    def part(self, index: int) -> LogpsPart:
        """See `PredictToStore`: of the responses that come without log-probs, what they are to be asked of."""
        part = self.imported.part(index)
        prompts = [self._prompt_ids(r.prompt) for r in part.responses]
        responses = [self._response(r) for r in part.responses]
        for each, prompt, response, where in zip(part.responses, prompts, responses, part.where, strict=True):
            self._check(each, prompt, response, where)
        unscored = [row for row, each in enumerate(part.responses) if each.logps is None]
        count = len(responses)
        table = RolloutTable.from_arrow(
            pa.table(
                {
                    "group": pa.array(part.groups, pa.int64()),
                    "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
                    "response_ids": pa.array([r.ids for r in responses], pa.list_(pa.int32())),
                    "logps": pa.array([r.logps for r in responses], pa.list_(pa.float32())),
                    "temperature": pa.array([self.batcher.sampler.temperature] * count, pa.float64()),
                    "reward": pa.array([0.0] * count, pa.float32()),
                }
            )
        )
        rows = torch.tensor(unscored, dtype=torch.long)
        batches = list(micro_batches(table, self.batcher.max_tokens, rows)) if unscored else []
        return LogpsPart(index, 0, batches, source=(part, prompts, responses))

    def columns(self, batch: LogpsPart, output: Any) -> pa.Table:
        """See `PredictToStore`: the rows of the `ROLLOUTS` schema."""
        part, prompts, responses = batch.source
        found = batch.by_row(output)
        responses = [
            response._replace(logps=found[row].tolist()) if row in found else response
            for row, response in enumerate(responses)
        ]
        made = PromptBatch(
            index=batch.index,
            prompts=[self._shown(each, ids) for each, ids in zip(part.responses, prompts, strict=True)],
            prompt_ids=prompts,
            groups=part.groups,
            samples=1,
            seed=0,
            max_tokens=self.batcher.max_tokens,
            tokenizer=self.batcher.tokenizer,
            sampler=self.batcher.sampler,
            verifier=self.batcher.verifier,
            correct_threshold=self.batcher.correct_threshold,
        )
        table = made.record(responses, range(len(responses)))
        table = _with(table, "sample", part.samples)
        if self.imported.source.rewards == "recorded":
            recorded = [each.reward for each in part.responses]
            table = _with(table, "reward", [0.0 if reward is None else reward for reward in recorded])
            table = _with(table, "checked", [reward is not None for reward in recorded])
        return table

    def finish(self) -> None:
        """See `PredictToStore`; the recorded scores are kept beside the rollouts."""
        super().finish()
        assert self.trainer is not None
        if self.trainer.is_global_zero and self.imported.has_rewards and self.imported.source.rewards == "verifier":
            write_recorded(self.path, self.imported, self.batcher.correct_threshold)
        self.trainer.strategy.barrier()

    def _prompt_ids(self, prompt: Any) -> list[int]:
        return list(prompt) if is_token_ids(prompt) else tokenize(self.batcher.tokenizer, prompt)

    def _response(self, imported: Imported) -> Response:
        if isinstance(imported.response, str):
            ids: list[int] = self.batcher.tokenizer(imported.response, add_special_tokens=False).input_ids
            reason = imported.finish_reason or "stop"
            if reason == "stop" and not (ids and ids[-1] in self._ends):
                ids = [*ids, self.batcher.tokenizer.eos_token_id]
        else:
            ids = imported.response
            reason = imported.finish_reason or ("stop" if ids[-1] in self._ends else "length")
        return Response(ids, imported.logps or [0.0] * len(ids), reason)

    def _check(self, imported: Imported, prompt: Sequence[int], response: Response, where: str) -> None:
        if not response.ids:
            raise UserError(f"{where}: a response has no tokens, not even one that ends it: leave it out")
        length, context = len(prompt) + len(response.ids), self.batcher.context
        if context is not None and length > context:
            raise UserError(
                f"{where}: prompt and response have {length} tokens, more than the policy's context of {context}"
            )
        text = self.batcher.tokenizer.decode(response.ids, skip_special_tokens=True)
        if imported.text not in (None, text):
            raise UserError(
                f"{where}: its token ids say something else with the policy's tokenizer than with the one that they "
                "were sampled with: the two do not belong together"
            )

    def _shown(self, imported: Imported, ids: list[int]) -> Prompt:
        """The prompt as a person would read it."""
        shown: Any = imported.prompt_text or imported.prompt
        return Prompt(self.batcher.tokenizer.decode(ids) if is_token_ids(shown) else shown, imported.answer)


@dataclass(frozen=True)
class Disagreements:
    """How often a recorded score and the verifier say different things.

    Attributes:
        compared: Responses that have a recorded score and could be checked.
        different: Those of which one calls correct what the other does not.
    """

    compared: int
    different: int


def write_recorded(path: Path, imported: ImportedRows, correct_threshold: float) -> Disagreements:
    """Keep the recorded scores beside the rollouts, and list the responses of which the verifier says otherwise.

    Args:
        path: Directory of the finished rollouts.
        imported: What they were imported from.
        correct_threshold: Score from which a response counts as correct.
    """
    rollouts = Store.open(path, verify=False)
    names = ("prompt", "response", "answer", "reward", "checked")
    rows = (row for batch in rollouts.batches(names) for row in batch.to_pylist())
    scores: dict[int, float] = {}
    compared, listed = 0, []
    for number, (row, score) in enumerate(zip(rows, imported.recorded(), strict=True)):
        if score is None:
            continue
        scores[number] = score
        compared += row["checked"]
        if row.pop("checked") and (score >= correct_threshold) != (row["reward"] >= correct_threshold):
            listed.append(json.dumps({"row": number, **row, "recorded": score}, ensure_ascii=False))
    writer = StoreWriter(path / RECORDED_FOLDER, RECORDED, {"rollouts": rollouts.fingerprint})
    if not Store.exists(writer.path):
        writer.write_part(0, {"row": list(scores), "reward": list(scores.values())})
    writer.finish(1)
    atomic_write(path / DISAGREEMENTS, "".join(f"{line}\n" for line in listed))
    return Disagreements(compared, len(listed))


def disagreements(path: Path) -> Disagreements | None:
    """How often the verifier and the scores beside some rollouts disagree; None where none were recorded."""
    if not Store.exists(path / RECORDED_FOLDER):
        return None
    scored = Store.open(path / RECORDED_FOLDER).table(["row"])["row"].to_numpy()
    checked = Store.open(path, verify=False).table(["checked"])["checked"].to_numpy()
    listed = (path / DISAGREEMENTS).read_text(encoding="utf-8").count("\n")
    return Disagreements(int(checked[scored].sum()), listed)


def _with(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """A table of the `ROLLOUTS` schema with another column."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, ROLLOUTS.field(name), pa.array(values, ROLLOUTS.field(name).type))
