"""Reading of a source: which of its rows are prompts, and which are left out, counted by reason."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

from ...errors import InvalidArgument, UserError
from ..tokenize import Message, as_text
from .answers import AnswerFinder, SlowPattern
from .rows import MissingColumn, Prompt, as_answer, check_whole, find_column, iterate_rows, make_prompt, unit_of
from .source import PromptSource, as_difficulty

Encode = Callable[[str | list[Message]], list[int]]
"""Makes token ids of what a prompt says."""

CHUNK_ROWS = 1024
"""Rows whose answers are looked for together."""


@dataclass
class ReadPrompts:
    """The prompts of a source, and which of its rows were left out.

    Attributes:
        source: The source.
        prompts: Its prompts.
        questions: What each of them asks in the source, before prefix, suffix and system prompt.
        rows: How many rows were read: all there are, or as many as `limit` took.
        left_out: Numbers of the rows that were left out, by reason; lines in a text file.
    """

    source: PromptSource
    prompts: list[Prompt] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    rows: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def report(self) -> str:
        """A line such as `gsm8k: 7,400 of 7,473 prompts: 50 longer than 512 tokens, 23 duplicates`."""
        reasons = ", ".join(f"{len(numbers):,} {reason}" for reason, numbers in self.left_out.items())
        limit = self.source.limit
        first = "" if limit is None or len(self.prompts) < limit else f"the first {limit:,}, "
        return f"{self.source}: {first}{len(self.prompts):,} of {self.rows:,} prompts" + f": {reasons}" * bool(reasons)

    def listed(self) -> list[str]:
        """What was left out, as lines of JSON: source, reason, and the numbers of the rows."""
        kind = f"{unit_of(self.source)}s"
        return [
            json.dumps({"source": str(self.source), "reason": reason, "count": len(numbers), kind: numbers})
            for reason, numbers in self.left_out.items()
        ]


def read_prompts(source: PromptSource | str | Path, encode: Encode | None = None, answered: bool = True) -> ReadPrompts:
    """Prompts of a file or data set.

    In its short form a source is a file, or a data set as `PromptSource.parse` takes it, with the columns `prompt` and
    `answer`. A number such as `18.0` is the answer `18`.

    Args:
        source: The source.
        encode: Makes token ids, for `max_prompt_tokens`.
        answered: Whether answers are needed; without, none is read, and all are empty.

    Raises:
        UserError: If the source is missing or empty, or names the line that holds no prompt or no answer.
        InvalidArgument: If lengths are to be compared, but nobody can say them.
    """
    source = PromptSource.parse(source)
    lengths = None
    if source.max_prompt_tokens is not None:
        if encode is None:
            raise InvalidArgument("max_prompt_tokens", "is given, but there is no tokenizer to count tokens with")
        lengths = _Lengths(source.max_prompt_tokens, encode)
    found = ReadPrompts(source)
    finder = AnswerFinder(source)
    try:
        _Reader(found, finder if answered else None, lengths).read()
    finally:
        finder.close()
    if not found.prompts:
        left_out = f" ({found.report()})" if found.rows else ""
        raise UserError(f"{source} holds no prompts{left_out}: at least one is needed")
    return found


def fingerprint_of(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what is asked and answered, in hexadecimal: of the prompts as they are used, wherever they lie."""
    digest = hashlib.sha256()
    for row in prompts:
        digest.update(json.dumps([row.prompt, row.answer]).encode() + b"\n")
    return digest.hexdigest()


@dataclass
class _Candidate:
    """A row that is not left out so far."""

    number: int
    question: str
    prompt: str | list[Message]
    answer: str


class _Reader:
    """Reads rows into `ReadPrompts`.

    Args:
        found: Takes what is read.
        finder: Finds the answers; None where none are needed.
        lengths: Compares lengths; None where any will do.
    """

    def __init__(self, found: ReadPrompts, finder: AnswerFinder | None, lengths: "_Lengths | None") -> None:
        self.found = found
        self.source = found.source
        self.finder = finder
        self.lengths = lengths
        self.answers: dict[str, str] = {}  # By question, for duplicates.

    def read(self) -> None:
        """Read until there are enough prompts, or no more rows."""
        rows = self._candidates()
        limit, prompts = self.source.limit, self.found.prompts
        while limit is None or len(prompts) < limit:
            missing = CHUNK_ROWS if limit is None else min(CHUNK_ROWS, limit - len(prompts))
            chunk = list(islice(rows, missing))
            if not chunk:
                return
            for row, answer in zip(chunk, self._answers(chunk), strict=True):
                if reason := self._reason(row, answer):
                    self._leave_out(reason, row.number)
                else:
                    prompts.append(Prompt(row.prompt, answer))
                    self.found.questions.append(row.question)

    def _candidates(self) -> Iterator[_Candidate]:
        """The rows with a prompt, and with a difficulty that is asked for."""
        source = self.source
        unit, difficulties = unit_of(source), source.difficulty_range
        for number, row in iterate_rows(source):
            self.found.rows += 1
            where = f"{source}, {unit} {number}"
            try:
                prompt = find_column(row, source.prompt_column)
                answer = "" if self.finder is None else find_column(row, source.answer_column)
                difficulty = source.difficulty_column and find_column(row, source.difficulty_column)
            except MissingColumn as error:
                raise UserError(f"{where} {error}") from None
            if source.difficulty_column and (reason := _beyond(difficulty, *difficulties)):
                self._leave_out(reason, number)
                continue
            asked = make_prompt(source, prompt, where)
            if answer is None and not source.skip_unanswered:
                raise UserError(f"{where}: {self._no_answer('null')}")
            if (text := "" if answer is None else as_answer(answer)) is None:
                raise UserError(f"{where}: {source.answer_column} must be a string or a finite number, as an answer is")
            check_whole(text, source.answer_column, where)
            yield _Candidate(number, _question(prompt), asked, text)

    def _answers(self, chunk: Sequence[_Candidate]) -> list[str]:
        """The answer of each row; empty where it may have none.

        Raises:
            UserError: Names the row that must have one.
        """
        if self.finder is None:
            return [""] * len(chunk)
        place = f"{self.source}, {unit_of(self.source)}"
        try:
            answers = self.finder([row.answer for row in chunk])
        except SlowPattern as error:
            raise UserError(
                f"{place} {chunk[error.index].number}: answer_pattern took longer than {self.source.answer_timeout} s"
            ) from None
        for row, answer in zip(chunk, answers, strict=True):
            if not answer and not self.source.skip_unanswered:
                raise UserError(f"{place} {row.number}: {self._no_answer(_shown(row.answer))}")
        return answers

    def _no_answer(self, value: str) -> str:
        source = self.source
        if source.answer_pattern is not None:
            how = "no match of answer_pattern"
        else:
            how = {"as_is": "no answer", "hashes": "no answer after ####", "boxed": "no answer in a \\boxed{}"}[
                source.answer_rule
            ]
        return f"there is {how} in {source.answer_column} ({value}); skip_unanswered: true leaves such rows out"

    def _reason(self, row: _Candidate, answer: str) -> str | None:
        """Why a row is left out, if it is."""
        if not answer and self.finder is not None:
            return "without an answer"
        if self.source.drop_duplicates:
            if row.question in self.answers:
                same = self.answers[row.question] == answer
                return "duplicates" if same else "duplicates with another answer"
            self.answers[row.question] = answer
        if self.lengths is not None and not self.lengths.fits(row.prompt):
            return f"longer than {self.lengths.most:,} tokens"
        return None

    def _leave_out(self, reason: str, number: int) -> None:
        self.found.left_out.setdefault(reason, []).append(number)


class _Lengths:
    """Says whether prompts are short enough, without making tokens of those that surely are.

    A character of ASCII is at most a token. What special tokens and the chat template add is at most what the first
    prompt with the same roles has in all.

    Args:
        most: Tokens of the longest prompt.
        encode: Makes token ids.
    """

    def __init__(self, most: int, encode: Encode) -> None:
        self.most = most
        self._encode = encode
        self._added: dict[tuple[str, ...], int] = {}

    def fits(self, prompt: str | list[Message]) -> bool:
        """Whether a prompt has no more tokens."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        roles = () if isinstance(prompt, str) else tuple(message["role"] for message in prompt)
        is_plain = all(isinstance(text, str) and text.isascii() for text in texts)
        if roles in self._added and is_plain and sum(map(len, texts)) + self._added[roles] <= self.most:
            return True
        tokens = len(self._encode(prompt))
        self._added.setdefault(roles, tokens)
        return tokens <= self.most


def _beyond(value: object, low: Fraction | None, high: Fraction | None) -> str | None:
    """Why a difficulty is not asked for, if it is not."""
    difficulty = as_difficulty(value)
    if difficulty is None:
        return "without a difficulty"
    if low is not None and difficulty < low:
        return f"of a difficulty below {low}"
    if high is not None and difficulty > high:
        return f"of a difficulty above {high}"
    return None


def _question(prompt: str | list[Message]) -> str:
    """What a prompt asks: its text, or that of a chat of one user's message."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        content = prompt[0]["content"]
        return content if isinstance(content, str) else as_text(prompt)
    return as_text(prompt)


def _shown(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else f"…{text[-most:]}")
