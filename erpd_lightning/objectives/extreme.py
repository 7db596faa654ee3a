"""Objectives of the extreme region stage: many epochs on fixed rollouts under a weak constraint.

The terms are per token or per response. The caller leaves out padding and fillers, sums the rest, and
divides once by the number of response tokens, or of responses, of the whole optimiser step.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

# exp(80) is finite in float32, and any sensible temperature has saturated the sigmoid long before.
MAX_LOG_RATIO = 80.0


def sapo_terms(
    logps: Tensor,
    anchor_logps: Tensor,
    advantages: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """Soft adaptive policy optimisation, `-(4 / tau) * sigmoid(tau * (r - 1)) * A`: `(B, T)`.

    `r = exp(logps - anchor_logps)`, and tau is `tau_positive` where A > 0, else `tau_negative`. At
    r = 1 the gradient with respect to `logps` is -A. Finite even for an infinite log-ratio.
    Source: arXiv 2511.20347.

    Args:
        logps: `(B, T)` of the policy that is trained, in nats.
        anchor_logps: `(B, T)` of the policy the importance ratio refers to, in nats.
        advantages: `(B,)`, one for all tokens of a response.
        tau_positive: temperature of the soft gate where the advantage is positive.
        tau_negative: temperature of the soft gate elsewhere.
    """
    advantages = advantages.to(logps.dtype)[:, None]
    tau = torch.full_like(advantages, tau_negative).masked_fill(advantages > 0, tau_positive)
    ratio = (logps - anchor_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


def cross_entropy_terms(logps: Tensor) -> Tensor:
    """`-log pi(token)`, in nats: `(B, T)` to `(B, T)`."""
    return -logps


def flip(rewards: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards `1 - R` and advantages `-A`, `(N,)` each, which make the unlearned policy.

    What was right (reward 1) counts as wrong (reward 0), and the other way round.
    """
    return 1 - rewards, -advantages


class ExtremeObjective(ABC):
    """What the extreme region stage minimises.

    Attributes:
        needs_groups: Whether it compares the responses to one prompt, so that one alone tells it nothing.
        per: What there is one term of, and what their sum is divided by: the response tokens of the whole
            optimiser step, or its responses.
    """

    needs_groups: bool = True
    per: Literal["token", "response"] = "token"

    @abstractmethod
    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Responses that enter the loss at all: `(N,)` rewards and advantages to bool `(N,)`."""

    @abstractmethod
    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """Terms to minimise: `(B, T)` where `per` is `token`, `(B,)` where it is `response`.

        What terms of tokens hold outside the mask, and terms of responses where a row's mask is all False, does
        not count. A term of a response must not depend on what its tokens hold outside the mask.

        Args:
            logps: `(B, T)` of the policy that is trained, in nats.
            anchor_logps: `(B, T)` of the policy the importance ratio refers to, in nats.
            mask: `(B, T)` bool, True on response tokens; all False in a row that only fills up the batch.
            rewards: `(B,)`.
            advantages: `(B,)`.
        """


class AdvantageObjective(ExtremeObjective):
    """An objective that learns from advantages: those with none have nothing to say to it."""

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Responses with an advantage: bool `(N,)`."""
        return advantages != 0


class SAPO(AdvantageObjective):
    """Soft adaptive policy optimisation (arXiv 2511.20347); see `sapo_terms`.

    Args:
        tau_positive: Temperature of the soft gate where the advantage is positive.
        tau_negative: Temperature where the advantage is negative; larger closes the gate sooner.

    Raises:
        ValueError: for a temperature that is not a positive number.
    """

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05) -> None:
        for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
            if not 0 < tau < math.inf:
                raise ValueError(f"{name} is {tau}; it has to be a positive number")
        self.tau_positive = tau_positive
        self.tau_negative = tau_negative

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`sapo_terms`; the rewards count only through the advantages."""
        return sapo_terms(
            logps,
            anchor_logps,
            advantages,
            tau_positive=self.tau_positive,
            tau_negative=self.tau_negative,
        )


class CrossEntropy(ExtremeObjective):
    """Rejection-sampling fine-tuning: cross-entropy on the responses with reward 1."""

    needs_groups = False

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Responses with reward 1: bool `(N,)`."""
        return rewards == 1

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`cross_entropy_terms` on the rows with reward 1, and 0 on the others."""
        return torch.where((rewards == 1)[:, None], cross_entropy_terms(logps), 0.0)
