"""Objectives of the extreme region stage: many epochs on fixed rollouts under a weak constraint.

A loss is per token or per response. The caller leaves out padding and dummy micro-batches, sums the rest, and
divides once by the number of response tokens, or of responses, of the whole optimiser step.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .shapes import check_shape

# Nats. exp(80) is finite in float32, and any sensible temperature has saturated the sigmoid long before.
MAX_LOG_RATIO = 80.0


def flip_outcomes(rewards: Tensor, advantages: Tensor, correct_threshold: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rewards and advantages `-A`, `(N,)` each, which make the unlearned policy.

    A correct response (a reward of at least the threshold) counts as an incorrect one, and the other way round: of the
    rewards, graded ones too, the threshold is made where the response is incorrect, and 1 less where it is correct.
    With rewards 1 and 0 that is `1 - R`. A reward of NaN, of what could not be checked, stays NaN.

    Args:
        rewards: `(N,)`.
        advantages: `(N,)`.
        correct_threshold: Reward from which a response counts as correct.

    Example:
        >>> flip_outcomes(torch.tensor([1.0, 0.0]), torch.tensor([0.5, -0.5]))
        (tensor([0., 1.]), tensor([-0.5000,  0.5000]))
    """
    flipped = torch.where(rewards < correct_threshold, correct_threshold, correct_threshold - 1).to(rewards.dtype)
    return torch.where(rewards.isnan(), rewards, flipped), -advantages


def check_batch(logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> None:
    """Refuse what an `ExtremeObjective` is called with where the shapes do not fit each other.

    Raises:
        ValueError: begins with the argument's name.

    Example:
        >>> logps, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
        >>> check_batch(logps, logps, mask, torch.ones(2), torch.ones(2, 1))
        Traceback (most recent call last):
        ValueError: advantages has shape (2, 1); it has to be (2)
    """
    check_shape((None, None), logps=logps)
    check_shape(logps.shape, old_logps=old_logps, mask=mask)
    check_shape(logps.shape[:1], rewards=rewards, advantages=advantages)


class ExtremeObjective(ABC):
    """Loss of the extreme region stage.

    Attributes:
        needs_groups: Whether it compares the responses to one prompt, so that one response alone is of no use.
        per: What the loss is given for, and what its sum is divided by: the response tokens of the whole optimiser
            step, or its responses.
        correct_threshold: Reward from which a response counts as correct. The module that is trained sets it to that
            of its data.

    Example:
        >>> class SignedLogp(ExtremeObjective):
        ...     def select(self, rewards, advantages):
        ...         return advantages != 0
        ...     def __call__(self, logps, old_logps, mask, rewards, advantages):
        ...         return -advantages.sign()[:, None] * logps
        >>> SignedLogp().select(torch.ones(2), torch.tensor([0.0, -1.5]))
        tensor([False,  True])
    """

    needs_groups: bool = True
    per: Literal["token", "response"] = "token"
    correct_threshold: float = 1.0

    @abstractmethod
    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Responses that enter the loss at all: `(N,)` rewards and advantages to bool `(N,)`.

        The reward of what could not be checked is NaN, its advantage 0.
        """

    @abstractmethod
    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Loss to minimise: per token, `(B, T)`, or per response, `(B,)`, as `per` says.

        The caller ignores a per-token loss outside the mask, and a per-response loss where a row's mask is all
        False. A per-response loss must not depend on the values of its tokens outside the mask.

        Args:
            logps: `(B, T)` log-probs of the policy that is trained, in nats.
            old_logps: `(B, T)` log-probs of pi_old, which the importance ratio divides by, in nats.
            mask: `(B, T)` bool, True on response tokens; all False in a row of a dummy micro-batch.
            rewards: `(B,)`, any finite numbers.
            advantages: `(B,)`.

        Raises:
            ValueError: for arguments whose shapes do not fit each other.
        """


class AdvantageObjective(ExtremeObjective):
    """Objective that learns from advantages: responses with none are left out.

    Example:
        >>> SAPO().select(torch.ones(3), torch.tensor([1.5, 0.0, -0.5]))
        tensor([ True, False,  True])
    """

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Responses with an advantage: bool `(N,)`."""
        return advantages != 0


@dataclass
class SAPO(AdvantageObjective):
    """Soft adaptive policy optimisation, per token: `-(4 / tau) * sigmoid(tau * (r - 1)) * A`.

    `r = exp(logps - old_logps)`, and tau is `tau_positive` where A > 0, else `tau_negative`. At r = 1 the gradient
    with respect to `logps` is -A. Finite even for an infinite log-ratio. Source: arXiv 2511.20347.

    Args:
        tau_positive: Temperature of the soft gate where the advantage is positive.
        tau_negative: Temperature where the advantage is negative; larger closes the gate sooner.

    Raises:
        ValueError: for a temperature that is not a positive number.

    Example:
        >>> logps, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
        >>> SAPO()(logps, logps, mask, rewards=torch.ones(1), advantages=torch.ones(1))
        tensor([[-2., -2.]])
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for name, tau in (("tau_positive", self.tau_positive), ("tau_negative", self.tau_negative)):
            if not 0 < tau < math.inf:
                raise ValueError(f"{name} is {tau}; it has to be a positive number")

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Per-token loss `(B, T)`; the rewards count only through the advantages."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        advantages = advantages.to(logps.dtype)[:, None]
        tau = torch.full_like(advantages, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


@dataclass
class CrossEntropy(ExtremeObjective):
    """Rejection-sampling fine-tuning, per token: `-log pi` on the correct responses.

    Correct is a reward of at least `correct_threshold`, 1 unless the data say otherwise.

    Example:
        >>> logps, mask = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.ones(2, 2).bool()
        >>> CrossEntropy()(logps, logps, mask, rewards=torch.tensor([1.0, 0.0]), advantages=torch.zeros(2))
        tensor([[1., 2.],
                [0., 0.]])
    """

    needs_groups = False

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Correct responses: bool `(N,)`."""
        return rewards >= self.correct_threshold

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Per-token loss `(B, T)` in nats: 0 in the rows that are not correct."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        return torch.where((rewards >= self.correct_threshold)[:, None], -logps, 0.0)
