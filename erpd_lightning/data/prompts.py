"""Prompts with their token ids, and how they are shared out over rounds and uses."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..errors import InvalidArgument
from .sources import Prompt, PromptSource, ReadPrompts, fingerprint_of, read_prompts
from .tokenize import Message, as_text, shorten, tokenize

__all__ = [
    "Message",
    "Prompt",
    "PromptPlan",
    "PromptSet",
    "PromptSource",
    "as_text",
    "read_prompts",
    "shorten",
    "tokenize",
]


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
        train: The training prompts, as `read_prompts` takes them; None where nothing is sampled from them.
        validation: The same of held-out prompts; None for none.
        encode: Makes token ids of what a prompt says.
        per_round: Prompts of a round; each round takes the next ones, from the start again after the last. None for
            all of them.
        round: The round, from 1.
        previews: The last of the round's prompts, on which signals are previewed.
        max_validation: Held-out prompts that are used, the first ones; None for all of them.
        max_calibration: The most prompts outside the round on which a student's KL is measured.
    """

    train: PromptSource | str | Path | None
    validation: PromptSource | str | Path | None
    encode: Callable[[str | list[Message]], list[int]]
    per_round: int | None
    round: int
    previews: int
    max_validation: int | None
    max_calibration: int

    @cached_property
    def held_out(self) -> PromptSet:
        """The held-out prompts that are used; none where there is no file of them."""
        rows = [] if self._read_validation is None else self._read_validation.prompts
        held_out = PromptSet(rows[: self.max_validation], self.encode)
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

    @cached_property
    def train_fingerprint(self) -> str:
        """What tells the training prompts apart from others: what is asked and answered in all of them.

        Raises:
            InvalidArgument: If nobody says where they are.
        """
        return fingerprint_of(self._read_train.prompts)

    @cached_property
    def validation_fingerprint(self) -> str | None:
        """The same of the held-out prompts; None where there are none."""
        return None if self._read_validation is None else fingerprint_of(self._read_validation.prompts)

    @property
    def read(self) -> list[ReadPrompts]:
        """What was read of each source so far, and what was left out."""
        found = [vars(self).get(name) for name in ("_read_train", "_read_validation")]
        return [each for each in found if each is not None]

    @cached_property
    def _train(self) -> PromptSet:
        prompts = PromptSet(self._read_train.prompts, self.encode)
        self._warn_of_overlap()
        return prompts

    @cached_property
    def _read_train(self) -> ReadPrompts:
        if self.train is None:
            raise InvalidArgument("prompts", "is null: it has to name a file or data set to sample from")
        return self._read("prompts", self.train)

    @cached_property
    def _read_validation(self) -> ReadPrompts | None:
        return None if self.validation is None else self._read("validation_prompts", self.validation)

    def _read(self, argument: str, source: PromptSource | str | Path) -> ReadPrompts:
        try:
            found = read_prompts(source, self.encode)
        except InvalidArgument as error:
            raise error.under(argument) from error
        if found.left_out:
            rank_zero_info(found.report())
        return found

    def _warn_of_overlap(self) -> None:
        """Warn of held-out prompts that are training prompts too, as soon as both are read."""
        if len(self.read) < 2:
            return
        train, validation = self.read
        asked, held_out = set(train.questions), validation.questions[: self.max_validation]
        if shared := sum(question in asked for question in held_out):
            rank_zero_warn(
                f"{shared} of the {len(held_out)} held-out prompts in {validation.source} are training prompts of "
                f"{train.source} too: what is measured on them is no held-out accuracy"
            )

    @cached_property
    def _round(self) -> list[int]:
        """Indices of the round's prompts."""
        available = len(self._train)
        count = self.per_round or available
        if count > available:
            source = self._read_train.source
            raise InvalidArgument("prompts_per_round", f"is {count}, but {source} holds {available} prompts")
        if self.previews >= count:
            raise InvalidArgument(
                "preview_prompts",
                f"is {self.previews}: that many are held out for previews, but a round has only {count} prompts",
            )
        first = (self.round - 1) * count
        return [i % available for i in range(first, first + count)]
