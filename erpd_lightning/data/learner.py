"""`Learner`: the module that is trained, as the data module knows it."""

from typing import Protocol

import pyarrow as pa
from torch import Tensor

from .predict_data import PolicySource
from .prompt_batches import PromptBatch
from .rescoring import LogpsPart


class Learner(PolicySource, Protocol):
    """What the data module needs to know of the module that is trained; the module hands itself over in `setup`."""

    @property
    def iterations(self) -> int:
        """Parts of the prompts that it answers itself, unverified; 1 for the rollouts that there are."""

    @property
    def needs_groups(self) -> bool:
        """Whether its objective compares the responses to a prompt."""

    @property
    def calibrates(self) -> bool:
        """Whether it is also validated on unused training prompts."""

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Which responses enter the loss; see `train_rollouts.Select`."""

    def respond(self, batch: PromptBatch) -> pa.Table:
        """Responses to prompts, a table of the `ROLLOUTS` schema."""

    def token_logps(self, part: LogpsPart) -> list[Tensor]:
        """Log-probs of the tokens of stored responses, `(B, T)` in nats for each batch."""
