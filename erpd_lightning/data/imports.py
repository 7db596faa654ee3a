"""Responses that were generated elsewhere: where they lie, what they hold, and whether they are what they should be."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import InvalidArgument, UserError
from .import_rows import StoreRows, open_rows
from .tokenize import Message, as_text
from .verifiers.base import MAX_REWARD

PART_RESPONSES = 256
"""Responses of a part, about."""


@dataclass
class ImportSource:
    """Where responses lie that were generated elsewhere, and what its columns are called.

    A row has a prompt, and one response or a list of them; log-probs, scores and finish reasons are lists then too.

    Attributes:
        path: JSONL or Parquet file, a data set such as `openai/gsm8k?config=main&split=test`, or a rollout store.
        prompt_column: Prompts: texts, lists of chat messages, or token ids.
        response_column: Responses: texts, or token ids with the one that ended them. A text ends with the tokenizer's
            end of sequence, unless its finish reason is `length`.
        answer_column: Answers to check responses against; not needed where the rewards are the recorded ones.
        logps_column: Log-probs of the response's tokens, in nats, under what they were drawn from; of token ids alone.
            None for `logps` where there is such a column.
        reward_column: Scores: numbers, or null. None for `reward` where there is such a column.
        finish_reason_column: `stop` or `length`. None for `finish_reason` where there is such a column.
        rewards: Whose rewards are trained on: those of the `verifier`, beside which the recorded ones are kept, or the
            `recorded` ones, without any verification.
    """

    path: str
    prompt_column: str = "prompt"
    response_column: str = "response"
    answer_column: str = "answer"
    logps_column: str | None = None
    reward_column: str | None = None
    finish_reason_column: str | None = None
    rewards: Literal["verifier", "recorded"] = "verifier"

    def __post_init__(self) -> None:
        if self.rewards not in ("verifier", "recorded"):
            raise InvalidArgument("rewards", f"is {self.rewards!r}: it must be verifier or recorded")


class Imported(NamedTuple):
    """One response from elsewhere.

    Attributes:
        prompt: Text, chat messages or token ids.
        answer: The answer that is correct.
        response: Text or token ids.
        logps: Log-probs of the token ids, in nats; None where nobody recorded them.
        reward: The recorded score; None where there is none.
        finish_reason: `stop` or `length`; None where nobody says.
        prompt_text: What the prompt's token ids say; None where nobody says.
        text: What the response's say by the tokenizer that they were made with; None where nobody says.
    """

    prompt: str | list[Message] | list[int]
    answer: str
    response: str | list[int]
    logps: list[float] | None
    reward: float | None
    finish_reason: str | None
    prompt_text: str | None
    text: str | None


class ImportedRows:
    """Responses of a source, read once to check them, and then part by part.

    Args:
        source: Where they lie.
        vocabulary: Number of tokens that the policy knows.

    Attributes:
        has_logps: Whether any of them come with log-probs.
        has_rewards: Whether any of them come with scores.

    Raises:
        UserError: Names the row that is broken, or the column that is missing.
    """

    def __init__(self, source: ImportSource, vocabulary: int) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self.rows = open_rows(source.path)
        self.is_store = isinstance(self.rows, StoreRows)
        self.has_logps = self.has_rewards = False
        self._names = {
            "prompt": "prompt_ids" if self.is_store else source.prompt_column,
            "response": "response_ids" if self.is_store else source.response_column,
            "answer": source.answer_column,
            "logps": source.logps_column or "logps",
            "reward": source.reward_column or "reward",
            "finish_reason": source.finish_reason_column or "finish_reason",
        }
        needed = ["prompt", "response"]
        is_named = source.answer_column != ImportSource.answer_column
        if is_named or source.answer_column in self.rows.columns or source.rewards == "verifier":
            needed.append("answer")
        self._needed = [self._names[name] for name in needed]
        named = (source.logps_column, source.reward_column, source.finish_reason_column)
        _check_columns([*self._needed, *filter(None, named)], self.rows.columns, self.rows.name)
        self._survey()

    @property
    def part_count(self) -> int:
        """Parts of about `PART_RESPONSES` responses."""
        return len(self._bounds) - 1

    def part(self, index: int) -> "ImportedPart":
        """One part."""
        start, stop = self._bounds[index : index + 2]
        responses, groups, samples, where = [], [], [], []
        for number, row in enumerate(self.rows.read(start, stop), start=start):
            for nth, response in enumerate(self._responses(row, self.rows.where(number))):
                responses.append(response)
                groups.append(int(self._groups[number]))
                samples.append(int(self._first_samples[number]) + nth)
                where.append(self.rows.where(number))
        return ImportedPart(responses, groups, samples, where)

    def recorded(self) -> Iterator[float | None]:
        """The recorded scores of all responses, in the order of the store."""
        for number, row in enumerate(self.rows):
            yield from (response.reward for response in self._responses(row, self.rows.where(number)))

    def _survey(self) -> None:
        """Read every row: check it, number its prompt, and cut the rows into parts."""
        numbers: dict[bytes, int] = {}
        answered: list[int] = []
        groups, firsts, bounds, pending = [], [], [0], 0
        for number, row in enumerate(self.rows):
            where = self.rows.where(number)
            responses = self._responses(row, where)
            self.has_logps |= any(response.logps is not None for response in responses)
            self.has_rewards |= any(response.reward is not None for response in responses)
            key = hashlib.blake2b(json.dumps(responses[0].prompt).encode(), digest_size=16).digest()
            group = numbers.setdefault(key, len(numbers))
            if group == len(answered):
                answered.append(0)
            groups.append(group)
            firsts.append(answered[group])
            answered[group] += len(responses)
            pending += len(responses)
            if pending >= PART_RESPONSES:
                bounds.append(number + 1)
                pending = 0
        if bounds[-1] != len(self.rows):
            bounds.append(len(self.rows))
        self._groups, self._first_samples, self._bounds = np.array(groups), np.array(firsts), bounds

    def _responses(self, row: dict[str, Any], where: str) -> list[Imported]:
        _check_columns(self._needed, row, where)
        value = {name: row.get(column) for name, column in self._names.items()}
        prompt = _prompt(value["prompt"], where)
        if is_token_ids(prompt):
            self._check_ids(prompt, where, self._names["prompt"])
        answer = ""
        if self._names["answer"] in self._needed:
            answer = _answer(value["answer"], where, self._names["answer"])
        several = _is_several(value["response"])
        responses = value["response"] if several else [value["response"]]
        if not responses:
            raise UserError(f"{where}: {self._names['response']} holds no response")
        if self.is_store and not row["checked"]:
            value["reward"] = None
        beside = {}
        for name in ("logps", "reward", "finish_reason"):
            given = value[name]
            beside[name] = given if several and given is not None else [given] * len(responses)
            if several and (not isinstance(beside[name], list) or len(beside[name]) != len(responses)):
                raise UserError(
                    f"{where}: {self._names[name]} must be a list with one entry for each of {len(responses)} responses"
                )
        return [
            Imported(
                prompt,
                answer,
                self._response(response, where),
                self._logps(logps, response, where),
                _reward(reward, where, self._names["reward"]),
                _finish_reason(reason, where, self._names["finish_reason"]),
                row["prompt"] if self.is_store else None,
                row["response"] if self.is_store else None,
            )
            for response, logps, reward, reason in zip(responses, *beside.values(), strict=True)
        ]

    def _response(self, response: Any, where: str) -> str | list[int]:
        column = self._names["response"]
        if isinstance(response, str):
            return _whole(response, where, column)
        if not is_token_ids(response) or not response:
            raise UserError(f"{where}: {column} must be a text or a list of token ids, not empty, or a list of these")
        self._check_ids(response, where, column)
        return list(response)

    def _check_ids(self, ids: Iterable[Any], where: str, column: str) -> None:
        outside = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if outside is not None:
            raise UserError(
                f"{where}: {column} has the token id {outside}, but the policy's vocabulary ends at "
                f"{self.vocabulary - 1}"
            )

    def _logps(self, logps: Any, response: Any, where: str) -> list[float] | None:
        if logps is None:
            return None
        column = self._names["logps"]
        if isinstance(response, str):
            raise UserError(
                f"{where}: {column} are log-probs of a text: nobody can say of which tokens; give token ids, or leave "
                "them out"
            )
        numbers = isinstance(logps, list) and all(isinstance(logp, int | float) for logp in logps)
        if not numbers or len(logps) != len(response):
            raise UserError(f"{where}: {column} must have one number for each of the {len(response)} response tokens")
        if not all(-math.inf < logp <= 0 for logp in logps):
            raise UserError(f"{where}: {column} must be log-probs in nats: finite, and not above 0")
        return [float(logp) for logp in logps]


class ImportedPart(NamedTuple):
    """Some responses from elsewhere.

    Attributes:
        responses: The responses.
        groups: What numbers the prompt of each.
        samples: What numbers each among those to its prompt.
        where: What to call its row in the source.
    """

    responses: list[Imported]
    groups: list[int]
    samples: list[int]
    where: list[str]


def import_fingerprint(source: ImportSource) -> str:
    """What tells responses apart from others: their content, and what the columns are taken for.

    Raises:
        UserError: If they cannot be read.
    """
    settings = {**asdict(source), "path": open_rows(source.path).fingerprint}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_columns(expected: Iterable[str], columns: Iterable[str], where: str) -> None:
    there = list(columns)
    for column in expected:
        if column not in there:
            raise UserError(f"{where} has no column {column!r}: there are {', '.join(there)}")


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _is_several(value: Any) -> bool:
    """Whether a response is a list of them: of texts, or of lists of token ids."""
    return isinstance(value, list) and (not value or isinstance(value[0], str | list))


def _whole(text: str, where: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where}: {column} has half a character, {half}: it was cut in two somewhere") from None
    return text


def _prompt(prompt: Any, where: str) -> str | list[Message] | list[int]:
    messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or messages or is_token_ids(prompt)):
        raise UserError(f"{where}: a prompt must be a text, a list of chat messages or of token ids, not empty")
    _whole(as_text(prompt), where, "the prompt")
    checked: str | list[Message] | list[int] = prompt
    return checked


def _answer(answer: Any, where: str, column: str) -> str:
    if isinstance(answer, float) and math.isfinite(answer) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: {column} must be a text or a number")
    return _whole(str(answer), where, column)


def _reward(reward: Any, where: str, column: str) -> float | None:
    if reward is None:
        return None
    if not isinstance(reward, int | float) or not abs(reward) <= MAX_REWARD:
        raise UserError(f"{where}: {column} must be a finite number, or null where there is no score")
    return float(reward)


def _finish_reason(reason: Any, where: str, column: str) -> str | None:
    if reason not in (None, "stop", "length"):
        raise UserError(f"{where}: {column} is {reason!r}: it must be stop or length, or null where nobody says")
    return None if reason is None else str(reason)
