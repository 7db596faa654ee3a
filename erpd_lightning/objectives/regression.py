"""Objective of the extreme region stage that regresses the log-ratio on the advantage."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .extreme import MAX_LOG_RATIO, AdvantageObjective, check_batch

DEFAULT_BETA = {"sequence": 0.1, "token": 1.0}
"""Advantage per nat of log-ratio, by level."""


@dataclass
class SquaredError(AdvantageObjective):
    """Squared error of the log-ratio, per response `(beta * sum_t l_t - A)^2` or per token `(beta * l_t - A)^2`. Ours.

    `l = log(pi / pi_ref)`, or `log pi` without a reference. The optimum has a log-ratio of `A / beta` nats, of a whole
    response or of each token: the regression ends where it is reached, without any clip. Finite even for an infinite
    log-ratio, where the gradient is 0.

    Args:
        level: `sequence`, one loss per response, or `token`, one per token.
        beta: Advantage per nat of log-ratio; null for 0.1 (sequence) or 1 (token). An advantage is of the order of
            1, so that 0.1 asks for 10 nats a response: 0.7 nats a token of 15 tokens, which is extreme, 0.08 of
            120, 0.01 of 1,000, which is mild. A token is asked for 1 nat whatever the length.
        reference: `base`, the policy whose log-probs came with the rollouts; null for none, which regresses the
            log-prob itself: correct responses are then pulled to probability 1, and incorrect ones to
            `exp(A / beta)`, up to it too where they are less likely.

    Raises:
        ValueError: for an unknown level or reference, or a beta that is not a positive number.

    Example:
        >>> logps, old_logps, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -4.0]]), torch.ones(1, 2).bool()
        >>> SquaredError(beta=0.5)(logps, old_logps, mask, rewards=torch.ones(1), advantages=torch.tensor([2.0]))
        tensor([0.2500])
    """

    level: Literal["sequence", "token"] = "sequence"
    beta: float | None = None
    reference: Literal["base"] | None = "base"

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level is {self.level!r}; it has to be 'sequence' or 'token'")
        if self.reference not in ("base", None):
            raise ValueError(f"reference is {self.reference!r}; it has to be 'base', or null for none")
        if self.beta is None:
            self.beta = DEFAULT_BETA[self.level]
        elif not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; it has to be a positive number, or null for the level's default")
        self.per = "response" if self.level == "sequence" else "token"

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Loss per response `(B,)` or per token `(B, T)`; the rewards count only through the advantages."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        assert self.beta is not None
        log_ratio = logps if self.reference is None else logps - old_logps
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        advantages = advantages.to(log_ratio.dtype)
        if self.level == "token":
            return (self.beta * log_ratio - advantages[:, None]).square()
        return (self.beta * torch.where(mask, log_ratio, 0.0).sum(-1) - advantages).square()
