"""Prompts: read from files or data sets, told apart by content, and shared out over rounds."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import InvalidArgument, UserError, first_line
from ..files import sha256_file
from .repeated_keys import without_repeated_keys
from .tokenize import Message, as_text, shorten, tokenize

__all__ = [
    "DataSetSource",
    "Message",
    "Prompt",
    "PromptPlan",
    "PromptSet",
    "as_text",
    "check_sources",
    "prompts_fingerprint",
    "read_prompts",
    "shorten",
    "tokenize",
]

OPTIONS_EXAMPLE = "openai/gsm8k?config=main&split=test"
"""A data set with a configuration and a split, for messages."""

MAX_EXACT_FLOAT = 2**53
"""Floats below this size that have an integer value stand for that integer alone."""


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
        train: JSONL file or data set of the training prompts, as `read_prompts` takes it; None where nothing is
            sampled from them.
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
        held_out = PromptSet(self._validation_rows[: self.max_validation], self.encode)
        self._warn_of_overlap()
        return held_out

    def sampled(self, iteration: int = 1, iterations: int = 1) -> PromptSet:
        """The prompts of the round that rollouts are sampled from, or an iteration's part of them.

        Raises:
            InvalidArgument: If there is no file of prompts, or previews take all that are in it, or there are fewer of
                them than iterations.
        """
        indices = self._round[: len(self._round) - self.previews]
        if iterations > len(indices):
            raise InvalidArgument("iterations", f"is {iterations}, but a round has only {len(indices)} prompts")
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
        prompts = PromptSet(self._train_rows, self.encode)
        self._warn_of_overlap()
        return prompts

    @cached_property
    def _train_rows(self) -> list[Prompt]:
        return read_prompts(self.source)

    @cached_property
    def _validation_rows(self) -> list[Prompt]:
        return [] if self.validation is None else read_prompts(self.validation)

    def _warn_of_overlap(self) -> None:
        """Warn of held-out prompts that are training prompts too, as soon as both are read."""
        if not {"_train_rows", "_validation_rows"} <= vars(self).keys():
            return
        train = {as_text(row.prompt) for row in self._train_rows}
        held_out = self._validation_rows[: self.max_validation]
        if shared := sum(as_text(row.prompt) in train for row in held_out):
            rank_zero_warn(
                f"{shared} of the {len(held_out)} held-out prompts in {self.validation} are training prompts of "
                f"{self.train} too: what is measured on them is no held-out accuracy"
            )

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


@dataclass(frozen=True)
class DataSetSource:
    """A data set that `datasets.load_dataset` finds, and which part of it is meant.

    Attributes:
        name: Local folder or hub name.
        config: Its configuration; None for the only one, or the default.
        split: Its split, also in the slicing syntax of `datasets`, such as `train[:90%]`.
    """

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, source: str | Path) -> "DataSetSource | None":
        """What a source says, such as `openai/gsm8k?config=main&split=test`; None where it is a JSONL file.

        A folder whose own name has a question mark in it is taken for that folder.

        Raises:
            UserError: For an option that is not `config` or `split`, is empty or is given twice.
        """
        path, text = Path(source), str(source)
        if path.suffix == ".jsonl" or path.is_file():
            return None
        name, has_options, options = text.partition("?")
        if not has_options or path.exists():
            return cls(text)
        found: dict[str, str] = {}
        for option in options.split("&"):
            key, _, value = option.partition("=")
            if key not in ("config", "split") or not value or key in found:
                raise UserError(
                    f"{text}: {option!r} is no option of a data set; it has config and split, once each, as in "
                    f"{OPTIONS_EXAMPLE}"
                )
            found[key] = value
        return cls(name, **found)

    def same_rows(self, other: "DataSetSource") -> bool:
        """Whether another source names the same part of the same data set."""
        names = [str(Path(each.name).resolve()) if Path(each.name).is_dir() else each.name for each in (self, other)]
        return names[0] == names[1] and (self.config, self.split) == (other.config, other.split)


def check_sources(prompts: str | Path | None, validation_prompts: str | Path | None) -> None:
    """Refuse one part of a data set for both training and validation.

    Two files are left to `PromptPlan`, which counts what they share.

    Raises:
        InvalidArgument: If both name the same split of the same data set, such as `train`, which is the default.
        UserError: For options that no data set has.
    """
    parsed = [None if source is None else DataSetSource.parse(source) for source in (prompts, validation_prompts)]
    train, validation = parsed
    if train is not None and validation is not None and train.same_rows(validation):
        raise InvalidArgument(
            "validation_prompts",
            f"is {validation_prompts}, whose split {validation.split} is what prompts names too: name another split, "
            f"as in {OPTIONS_EXAMPLE}",
        )


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from a JSONL file, or from whatever `datasets.load_dataset` finds under a name.

    Each row has `prompt`, a string or a list of chat messages, and `answer`, a string or a finite number, of which
    `18.0` is `18`.

    Args:
        source: The file, or a data set as `DataSetSource.parse` takes it.

    Raises:
        UserError: If the file is missing or empty, or names the line that is no such row.
    """
    data_set = DataSetSource.parse(source)
    if data_set is None:
        prompts = list(_read_jsonl(Path(source)))
    else:
        rows = enumerate(_load_dataset(data_set), start=1)
        prompts = [_as_prompt(row, f"{source}, row {number}") for number, row in rows]
    if not prompts:
        raise UserError(f"{source} holds no prompts: at least one is needed")
    return prompts


def prompts_fingerprint(source: str | Path | None) -> str | None:
    """SHA-256 of what is in a source, in hexadecimal: the bytes of a file, or the rows of a data set; None for none.

    Raises:
        UserError: If it cannot be read.
    """
    if source is None:
        return None
    if DataSetSource.parse(source) is None:
        try:
            return sha256_file(source)
        except FileNotFoundError:
            raise UserError(_missing(source)) from None
        except OSError as error:
            raise UserError(f"{source} cannot be read as a JSONL file of prompts: {error}") from error
    digest = hashlib.sha256()
    for row in read_prompts(source):
        digest.update(json.dumps([row.prompt, row.answer]).encode() + b"\n")
    return digest.hexdigest()


def _missing(path: str | Path) -> str:
    return f"{path} is missing: a JSONL file of prompts is expected there"


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    try:
        # Not splitlines: it also cuts at characters that may stand in a JSON string, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a JSONL file of prompts: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=without_repeated_keys)
        except RecursionError:
            raise UserError(f"{where} is nested too deeply to be read") from None
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
    if isinstance(answer, float) and math.isfinite(answer) and answer.is_integer() and abs(answer) < MAX_EXACT_FLOAT:
        answer = int(answer)
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not (isinstance(answer, str) or number):
        raise UserError(f"{where}: answer must be a string or a finite number")
    for name, text in (("prompt", as_text(prompt)), ("answer", str(answer))):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise UserError(f"{where}: {name} has half a character, {half}: it was cut in two somewhere") from None
    return Prompt(prompt, str(answer))


def _load_dataset(source: DataSetSource) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # The many ways in which a data set can be missing or broken.
        raise UserError(
            f"{source.name} is neither a JSONL file nor a data set that can be loaded (split {source.split}; others "
            f"as in {OPTIONS_EXAMPLE}): {first_line(error)}"
        ) from error
