"""Prompts: read from files or data sets, tokenised, and answered by a policy."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..errors import UserError, first_line
from .samplers import Response, Sampler
from .store import ROLLOUTS
from .verifiers import Verifier

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as chat messages, and the answer that is right for it."""

    prompt: str | list[Message]
    answer: str


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with all that it takes to sample and verify responses to them.

    Attributes:
        index: Number of the batch among those of the whole pass, on whatever rank.
        prompts: The prompts.
        prompt_ids: Their token ids.
        groups: What numbers each prompt in the pass.
        samples: Responses to each prompt.
        seed: Seed of the draws.
        max_tokens: Padded tokens that may be run through a policy at a time.
        tokenizer: The policy's tokenizer.
        sampler: Draws the responses.
        verifier: Checks them.
    """

    index: int
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[list[int]]
    groups: Sequence[int]
    samples: int
    seed: int
    max_tokens: int
    tokenizer: Any
    sampler: Sampler
    verifier: Verifier

    def to(self, device: torch.device) -> "PromptBatch":
        """Itself: the prompts move to the policy's device when they are padded."""
        return self

    def respond(self, model: Any, seed: int | None = None) -> pa.Table:
        """Sample and verify `samples` responses to each prompt: a table of the `ROLLOUTS` schema.

        Args:
            model: The language model to sample from.
            seed: Another seed than the batch's own.
        """
        if not self.prompts:
            return ROLLOUTS.empty_table()
        repeated = [i for i in range(len(self.prompts)) for _ in range(self.samples)]
        responses = self.sampler.sample(
            model,
            self.tokenizer,
            [self.prompt_ids[i] for i in repeated],
            self.seed if seed is None else seed,
        )
        texts = self.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        rewards = self.verifier(texts, [self.prompts[i].answer for i in repeated])
        return rollout_table(self, repeated, responses, texts, rewards)


def rollout_table(
    batch: PromptBatch,
    repeated: Sequence[int],
    responses: Sequence[Response],
    texts: Sequence[str],
    rewards: Sequence[float | None],
) -> pa.Table:
    """The rows of a batch's responses; an answer that could not be checked is never rewarded."""
    columns = {
        "group": [batch.groups[i] for i in repeated],
        "sample": [n % batch.samples for n in range(len(repeated))],
        "prompt_ids": [batch.prompt_ids[i] for i in repeated],
        "response_ids": [r.ids for r in responses],
        "logps": [r.logps for r in responses],
        "reward": [reward or 0.0 for reward in rewards],
        "finish_reason": [r.finish_reason for r in responses],
        "checked": [reward is not None for reward in rewards],
        "prompt": [as_text(batch.prompts[i].prompt) for i in repeated],
        "response": list(texts),
        "answer": [batch.prompts[i].answer for i in repeated],
    }
    return pa.Table.from_pydict(columns, schema=ROLLOUTS)


def as_text(prompt: str | list[Message]) -> str:
    """A prompt as one string; chat messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from a JSONL file, or from whatever `datasets.load_dataset` finds under a name.

    Each row has `prompt`, a string or a list of chat messages, and `answer`, a string or a number.

    Raises:
        UserError: If the file is missing or empty, or names the line that is no such row.
    """
    path = Path(source)
    if path.suffix == ".jsonl" or path.is_file():
        prompts = list(_read_jsonl(path))
    else:
        prompts = [
            _as_prompt(row, f"{source}, row {number}") for number, row in enumerate(_load_dataset(str(source)), start=1)
        ]
    if not prompts:
        raise UserError(f"{source} holds no prompts: at least one is needed")
    return prompts


def tokenize(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """Token ids of a prompt; chat messages go through the tokenizer's chat template.

    Raises:
        UserError: If the prompt has no tokens, or the tokenizer has no template or refuses the messages.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
    else:
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # Templates are programs: they raise what they like.
            raise UserError(
                f"the tokenizer's chat template takes no prompt {shorten(prompt)}: {first_line(error)}"
            ) from error
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"prompt {shorten(prompt)} has no tokens: there must be one to predict a response from")
    return ids


def shorten(prompt: str | list[Message], most: int = 60) -> str:
    """The beginning of a prompt, for a message about it."""
    text = repr(as_text(prompt))
    return text if len(text) <= most else f"{text[:most]}…"


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    try:
        # Not splitlines: it also cuts at characters that may stand in a JSON string, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a JSONL file of prompts is expected there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a JSONL file of prompts: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        yield _as_prompt(row, where)


def _as_prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict) or "prompt" not in row or "answer" not in row:
        raise UserError(f'{where} must be an object like {{"prompt": …, "answer": …}}')
    prompt, answer = row["prompt"], row["answer"]
    messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or messages):
        raise UserError(f"{where}: prompt must be a string or a list of chat messages, not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: answer must be a string or a number")
    return Prompt(prompt, str(answer))


def _load_dataset(name: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split="train")
    except Exception as error:  # The many ways in which a data set can be missing or broken.
        raise UserError(
            f"{name} is neither a JSONL file nor a data set that can be loaded: {first_line(error)}"
        ) from error
