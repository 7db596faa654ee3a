"""`PromptSource`: where prompts are, which columns they are in, and which of them are used."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from ...errors import InvalidArgument, UserError, check_at_least

AnswerRule = Literal["as_is", "hashes", "boxed"]

OPTIONS_EXAMPLE = "openai/gsm8k?config=main&split=test"
"""A data set with a configuration and a split, for messages."""

FILE_FORMATS = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
"""Endings of files; a file with another one is read as JSON Lines."""


@dataclass(frozen=True)
class PromptSource:
    r"""Prompts in a file or data set, with the columns that hold them and what is left out.

    Columns that lie in others are named with dots, such as `reward_model.ground_truth`. Rows are used in their order.
    Nothing is left out in silence: `ReadPrompts` counts and lists it.

    Args:
        path: JSONL, JSON, CSV, TSV or Parquet file; or whatever `datasets.load_dataset` takes: a folder or hub name.
        config: Configuration of the data set; null for the only one, or the default.
        split: Its split, also in the slicing syntax of `datasets`, such as `train[:90%]`; null for `train`.
        revision: Commit, tag or branch on the hub; null for the latest.
        streaming: Whether rows are read as they are needed, instead of downloading the data set first; takes `limit`.
        prompt_column: Column of the prompt: text, or a list of chat messages with `role` and `content`.
        answer_column: Column of the answer: text or a number.
        answer_rule: What of the column is the answer: all of it (`as_is`), what follows the last `####` (`hashes`), or
            what is in the last `\boxed{}` (`boxed`).
        answer_pattern: Instead of a rule, a regular expression with one group; its last match is the answer.
        answer_timeout: Seconds that the pattern may take on one row.
        skip_unanswered: Whether rows without an answer are left out; otherwise they are a mistake.
        chat: Whether a prompt that is text becomes a chat with it as the user's message, so that the tokenizer's chat
            template is used.
        system_prompt: System message in front of each chat; text becomes a chat then.
        prefix: Text in front of a prompt; of a chat, in front of its last user message.
        suffix: Text behind it.
        max_prompt_tokens: Tokens of the longest prompt that is used, chat template included; null for any.
        difficulty_column: Column of the difficulty: a number, or a fraction such as `3/8`.
        min_difficulty: Least difficulty that is used; null for any.
        max_difficulty: Greatest difficulty that is used; null for any.
        drop_duplicates: Whether of rows with the same prompt only the first is used.
        limit: Prompts that are used, the first ones of those that are not left out; null for all.

    Raises:
        InvalidArgument: For a value out of range, or one that nothing reads.
    """

    path: str | Path
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    answer_rule: AnswerRule = "as_is"
    answer_pattern: str | None = None
    answer_timeout: float = 10.0
    skip_unanswered: bool = False
    chat: bool = False
    system_prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    max_prompt_tokens: int | None = None
    difficulty_column: str | None = None
    min_difficulty: float | str | None = None
    max_difficulty: float | str | None = None
    drop_duplicates: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, max_prompt_tokens=self.max_prompt_tokens, limit=self.limit)
        self._check_place()
        self._check_answer()
        low, high = self.difficulty_range
        if self.difficulty_column is None and not low is high is None:
            raise InvalidArgument("difficulty_column", "is null, but a difficulty is asked for: name its column")
        if self.difficulty_column is not None and low is high is None:
            raise InvalidArgument("difficulty_column", "is given without min_difficulty or max_difficulty")
        if low is not None and high is not None and low > high:
            raise InvalidArgument("min_difficulty", f"is {self.min_difficulty}, above max_difficulty")

    def _check_place(self) -> None:
        if not str(self.path):
            raise InvalidArgument("path", "is empty: a file or the name of a data set is expected")
        if self.streaming and self.limit is None:
            raise InvalidArgument("streaming", "is true without limit: say how many prompts are to be read")
        for name in ("config", "split", "revision"):
            if (value := getattr(self, name)) is not None and (self.is_file or not value):
                problem = "but a file has none" if self.is_file else "which names none"
                raise InvalidArgument(name, f"is {value!r}, {problem}")

    def _check_answer(self) -> None:
        if self.answer_rule not in ("as_is", "hashes", "boxed"):
            raise InvalidArgument("answer_rule", f"is {self.answer_rule!r}: it must be as_is, hashes or boxed")
        if not 0 < self.answer_timeout < float("inf"):
            raise InvalidArgument("answer_timeout", f"is {self.answer_timeout}: it must be above 0 s, and finite")
        if self.answer_pattern is None:
            return
        if self.answer_rule != "as_is":
            raise InvalidArgument("answer_pattern", f"is given beside answer_rule {self.answer_rule}: give one of them")
        try:
            groups = re.compile(self.answer_pattern).groups
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"is {self.answer_pattern!r}, which is no regular expression: {error}"
            raise InvalidArgument("answer_pattern", problem) from None
        if groups != 1:
            raise InvalidArgument("answer_pattern", f"is {self.answer_pattern!r}: it must have exactly one group")

    @classmethod
    def parse(cls, source: "str | Path | PromptSource") -> "PromptSource":
        """What a short form says: a JSONL file, or a data set such as `openai/gsm8k?config=main&split=test`.

        A folder whose own name has a question mark in it is taken for that folder.

        Raises:
            UserError: For an option that is not `config` or `split`, is empty or is given twice.
        """
        if isinstance(source, PromptSource):
            return source
        text = str(source)
        name, has_options, options = text.partition("?")
        if not has_options or _is_file(Path(source)) or Path(source).exists():
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
        return cls(name, config=found.get("config"), split=found.get("split"))

    @property
    def is_file(self) -> bool:
        """Whether it is a file of ours to read, or one that is missing."""
        return _is_file(Path(self.path))

    @property
    def loaded_split(self) -> str:
        """The split of the data set that is read."""
        return self.split or "train"

    @property
    def difficulty_range(self) -> tuple[Fraction | None, Fraction | None]:
        """The least and the greatest difficulty that are used.

        Raises:
            InvalidArgument: If one of them is no number.
        """
        return self._difficulty("min_difficulty"), self._difficulty("max_difficulty")

    def _difficulty(self, name: str) -> Fraction | None:
        value = getattr(self, name)
        number = as_difficulty(value)
        if value is not None and number is None:
            raise InvalidArgument(name, f"is {value!r}: it must be a number, or a fraction such as 3/8")
        return number

    def __str__(self) -> str:
        """Its short form, for messages; without columns and filters."""
        named = {"config": self.config, "split": self.split}
        options = "&".join(f"{name}={value}" for name, value in named.items() if value is not None)
        return f"{self.path}?{options}" if options else str(self.path)

    def same_rows(self, other: "PromptSource") -> bool:
        """Whether another source takes the same rows of the same data set: split and difficulties are the same."""

        def rows(source: PromptSource) -> tuple[object, ...]:
            folder = Path(source.path)
            place = str(folder.resolve()) if folder.is_dir() else str(source.path)
            chosen = source.difficulty_column, source.difficulty_range
            return place, source.config, source.loaded_split, source.revision, chosen

        return rows(self) == rows(other)


def as_difficulty(value: object) -> Fraction | None:
    """A difficulty as an exact number: a number, or text such as `0.5` or `3/8`; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return Fraction(value.replace(" ", "") if isinstance(value, str) else value)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def check_sources(prompts: "PromptSource | str | Path | None", validation: "PromptSource | str | Path | None") -> None:
    """Refuse one part of a data set for both training and validation.

    Two files are left to `PromptPlan`, which counts what they share.

    Raises:
        InvalidArgument: If both name the same split of the same data set, such as `train`, which is the default.
        UserError: For options that no data set has.
    """
    if prompts is None or validation is None:
        return
    train, held_out = PromptSource.parse(prompts), PromptSource.parse(validation)
    if not train.is_file and not held_out.is_file and train.same_rows(held_out):
        raise InvalidArgument(
            "validation_prompts",
            f"is {held_out}, whose split {held_out.loaded_split} is what prompts names too: name another split, "
            f"as in {OPTIONS_EXAMPLE}",
        )


def _is_file(path: Path) -> bool:
    return path.suffix == ".jsonl" or path.is_file() or (path.suffix in FILE_FORMATS and not path.is_dir())
