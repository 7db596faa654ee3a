"""Callback that says how far sampling is, by responses and tokens."""

import sys
from contextlib import ExitStack
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..data.predict_data import BatchList
from ..data.progress import listening
from ..errors import InvalidArgument

REWRITE_SECONDS = 1.0
"""Time between two states of a line that a terminal shows again and again."""


class SamplingProgress(Callback):
    """Callback that tells of the responses and tokens that predictions, tests and validations have sampled.

    Lightning's bars count batches, of which one may take many minutes. In a terminal one line is kept up to date;
    elsewhere, and while Lightning's own bar is there, a line is printed every so often. What is sampled in less time is
    not told of. Counts are those of the first process.

    Args:
        every_seconds: Time between two lines.

    Raises:
        InvalidArgument: If it is not above 0.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        if not every_seconds > 0:
            raise InvalidArgument("every_seconds", f"is {every_seconds}: it must be above 0")
        self.every_seconds = every_seconds
        self._resources = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "sampling", trainer.predict_dataloaders)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "evaluating", trainer.test_dataloaders)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "validating", trainer.val_dataloaders)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, trainer: Trainer, doing: str, loaders: Any) -> None:
        self._resources.close()
        if not trainer.is_global_zero:
            return
        loaders = loaders if isinstance(loaders, list) else [loaders]
        # Batches are not looked at: making them takes the tokens of all prompts, or all that is to be scored.
        if total := sum(loader.responses for loader in loaders if isinstance(loader, BatchList)):
            alone = trainer.progress_bar_callback is None and sys.stdout.isatty()
            self._counter = _Counter(doing, total, REWRITE_SECONDS if alone else self.every_seconds, alone)
            self._resources.enter_context(listening(self._counter.add))
            self._resources.callback(self._counter.finish)

    def _end(self) -> None:
        self._resources.close()


class _Counter:
    """Counts what is drawn, and says so now and then.

    Args:
        doing: What is done.
        total: Responses that will be drawn.
        every_seconds: Time between two lines.
        rewrites: Whether a line takes the place of the one before.
    """

    def __init__(self, doing: str, total: int, every_seconds: float, rewrites: bool) -> None:
        self.doing = doing
        self.total = total
        self.every_seconds = every_seconds
        self.rewrites = rewrites
        self.tokens = self.responses = 0
        self._began = self._told = monotonic()
        self._width = 0

    def add(self, tokens: int, responses: int) -> None:
        """Count, and tell if the last line is long ago."""
        self.tokens += tokens
        self.responses += responses
        if monotonic() - self._told >= self.every_seconds:
            self._tell()

    def finish(self) -> None:
        """Leave the terminal's line as it is, with what came last."""
        if self.rewrites and self._width:
            self._tell()
            print(flush=True)

    def _tell(self) -> None:
        self._told = monotonic()
        line = f"[{self.doing}] {self.text(self._told - self._began)}"
        if self.rewrites:
            # Spaces over what is left of a longer line before.
            print(f"\r{line}".ljust(self._width), end="", flush=True)
            self._width = len(line) + 1
        else:
            print(line, flush=True)

    def text(self, seconds: float) -> str:
        """How far it is after so many seconds, how fast, and how long it will take at that pace."""
        rate = self.tokens / seconds
        parts = [f"{self.responses:,} of {self.total:,} responses", f"{self.tokens:,} tokens", f"{rate:,.0f} a second"]
        if 0 < self.responses < self.total:
            parts.append(f"about {_duration(seconds * (self.total - self.responses) / self.responses)} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
