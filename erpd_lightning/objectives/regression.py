"""Objectives of the extreme region stage that regress the log-ratio on the advantage."""

import math
from typing import Literal

import torch
from torch import Tensor

from .extreme import MAX_LOG_RATIO, AdvantageObjective


def squared_error_terms(
    log_ratio: Tensor, mask: Tensor, advantages: Tensor, *, level: Literal["sequence", "token"], beta: float
) -> Tensor:
    """`(beta * sum_t l_t - A)^2`, `(B,)`, or per token `(beta * l_t - A)^2`, `(B, T)`; l the log-ratio. Ours.

    Finite even for an infinite log-ratio, where the gradient is 0.

    Args:
        log_ratio: `(B, T)`, `log pi - log pi_ref` or `log pi` alone, in nats.
        mask: `(B, T)` bool, True on response tokens.
        advantages: `(B,)`.
        level: Whether the log-ratio of a response as a whole is regressed, or that of each of its tokens.
        beta: Advantage per nat.
    """
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = advantages.to(log_ratio.dtype)
    if level == "token":
        return (beta * log_ratio - advantages[:, None]).square()
    return (beta * torch.where(mask, log_ratio, 0.0).sum(-1) - advantages).square()


class SquaredError(AdvantageObjective):
    """Regression of the log-ratio on the advantage; see `squared_error_terms`. Ours.

    The optimum has a log-ratio of `A / beta` nats, of a whole response or of each token: the regression ends where
    it is reached, without any clip.

    Args:
        level: `sequence`, one term a response, or `token`, one term a token.
        beta: Advantage per nat of log-ratio; null for 0.1 (sequence) or 1 (token). An advantage is of the order of
            1, so that 0.1 asks for 10 nats a response: 0.7 nats a token of 15 tokens, which is extreme, 0.08 of
            120, 0.01 of 1,000, which is mild. A token is asked for 1 nat whatever the length.
        reference: `base`, the policy whose log-probs came with the rollouts; null for none, which regresses the
            log-prob itself: right responses are then pulled to probability 1, and wrong ones to
            `exp(A / beta)`, up to it too where they are less likely.

    Raises:
        ValueError: for an unknown level or reference, or a beta that is not a positive number.
    """

    def __init__(
        self,
        level: Literal["sequence", "token"] = "sequence",
        beta: float | None = None,
        reference: Literal["base"] | None = "base",
    ) -> None:
        if level not in ("sequence", "token"):
            raise ValueError(f"level is {level!r}; it has to be 'sequence' or 'token'")
        if reference not in ("base", None):
            raise ValueError(f"reference is {reference!r}; it has to be 'base', or null for none")
        if beta is not None and not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}; it has to be a positive number, or null for the level's default")
        self.level = level
        self.beta = beta if beta is not None else {"sequence": 0.1, "token": 1.0}[level]
        self.reference = reference
        self.per = "response" if level == "sequence" else "token"

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`squared_error_terms`; the rewards count only through the advantages."""
        log_ratio = logps if self.reference is None else logps - anchor_logps
        return squared_error_terms(log_ratio, mask, advantages, level=self.level, beta=self.beta)
