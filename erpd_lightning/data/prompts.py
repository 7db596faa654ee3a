"""Prompts: read from files or data sets, tokenised once, and shared out over rounds."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from ..errors import InvalidArgument, UserError, first_line

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as chat messages, and the answer that is correct for it."""

    prompt: str | list[Message]
    answer: str


class PromptSet(Sequence[Prompt]):
    """Prompts with their token ids, which are made once, when they are first asked for.

    Args:
        prompts: The prompts.
        encode: Makes token ids of what a prompt says.
    """

    def __init__(self, prompts: Sequence[Prompt], encode: Callable[[str | list[Message]], list[int]]) -> None:
        self._prompts = prompts
        self._encode = encode
        self._indices: Sequence[int] = range(len(prompts))
        self._token_ids: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...

    def __getitem__(self, index: int | slice) -> "Prompt | PromptSet":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self._prompts[self._indices[index]]

    def take(self, indices: Iterable[int]) -> "PromptSet":
        """Some of them, in that order; what was tokenised of one is tokenised of the other."""
        taken = copy(self)
        taken._indices = [self._indices[index] for index in indices]
        return taken

    def token_ids(self, index: int) -> list[int]:
        """Token ids of a prompt.

        Raises:
            UserError: If it has none.
        """
        number = self._indices[index]
        if number not in self._token_ids:
            self._token_ids[number] = self._encode(self._prompts[number].prompt)
        return self._token_ids[number]


@dataclass(frozen=True)
class PromptPlan:
    """Which prompts a round samples from, and which it leaves for other uses; each source is read once.

    Attributes:
        train: JSONL file or data set of the training prompts; None where nothing is sampled from them.
        validation: The same of held-out prompts; None for none.
        encode: Makes token ids of what a prompt says.
        per_round: Prompts of a round; each round takes the next ones, from the start again after the last. None for
            all of them.
        round: The round, from 1.
        previews: The last of the round's prompts, on which signals are previewed.
        max_validation: Held-out prompts that are used, the first ones; None for all of them.
        max_calibration: The most prompts outside the round on which a student's KL is measured.
    """

    train: str | Path | None
    validation: str | Path | None
    encode: Callable[[str | list[Message]], list[int]]
    per_round: int | None
    round: int
    previews: int
    max_validation: int | None
    max_calibration: int

    @cached_property
    def held_out(self) -> PromptSet:
        """The held-out prompts that are used; none where there is no file of them."""
        prompts = [] if self.validation is None else read_prompts(self.validation)
        return PromptSet(prompts[: self.max_validation], self.encode)

    def sampled(self, iteration: int = 1, iterations: int = 1) -> PromptSet:
        """The prompts of the round that rollouts are sampled from, or an iteration's part of them.

        Raises:
            InvalidArgument: If there is no file of prompts, or previews take all that are in it.
        """
        indices = self._round[: len(self._round) - self.previews]
        first, last = ((iteration - k) * len(indices) // iterations for k in (1, 0))
        return self._train.take(indices[first:last])

    @property
    def previewed(self) -> PromptSet:
        """The prompts of the round that signals are previewed on."""
        return self._train.take(self._round[len(self._round) - self.previews :])

    @property
    def unused(self) -> PromptSet:
        """The training prompts that are not the round's, the next ones first."""
        if self.train is None:
            return PromptSet([], self.encode)
        available, following = len(self._train), self._round[-1] + 1
        return self._train.take(i % available for i in range(following, following + available - len(self._round)))

    @property
    def calibration(self) -> PromptSet:
        """The training prompts outside the round on which a student's KL is measured; none where all are in it."""
        return self.unused[: self.max_calibration]

    @property
    def source(self) -> str | Path:
        """Where the training prompts are.

        Raises:
            InvalidArgument: If nobody says.
        """
        if self.train is None:
            raise InvalidArgument("prompts", "is null: it has to name a file or data set to sample from")
        return self.train

    @cached_property
    def _train(self) -> PromptSet:
        return PromptSet(read_prompts(self.source), self.encode)

    @cached_property
    def _round(self) -> list[int]:
        """Indices of the round's prompts."""
        available = len(self._train)
        count = self.per_round or available
        if count > available:
            raise InvalidArgument("prompts_per_round", f"is {count}, but {self.train} holds {available} prompts")
        if self.previews >= count:
            raise InvalidArgument(
                "preview_prompts",
                f"is {self.previews}: that many are held out for previews, but a round has only {count} prompts",
            )
        first = (self.round - 1) * count
        return [i % available for i in range(first, first + count)]


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
