"""Objectives of the distillation stage: the signal enters the base policy on a KL budget.

The terms are per token and unmasked. The caller masks and sums them, and divides once by the number
of valid tokens of the whole optimiser step. Supports are laid out as in `tilt`.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from .clipped import check_clips, ppo_terms
from .divergences import MAX_EXPONENT, exact_kl
from .tilted_policy import tilt


def kl_to_target(student: Tensor, target: Tensor) -> Tensor:
    """`KL(pi_theta || pi*)` over support and tail, in nats: `(B, T, K+1)` log-probs to `(B, T)`."""
    return exact_kl(student, target)


def clipped_policy_gradient_terms(
    logps: Tensor,
    anchor_logps: Tensor,
    sampler_logps: Tensor,
    signal: Tensor,
    kl: Tensor,
    beta: float,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    truncate: float = 2.0,
) -> Tensor:
    """`-w min(r s, clip(r, 1 - epsilon_low, 1 + epsilon_high) s) + beta KL(pi_theta || pi_0)`: `(B, T)`, in nats.

    With `r = pi_theta / pi_old` and `w = min(C, pi_old / pi_sampler)`, C being `truncate`. On tokens of the sampler,
    without clip and truncation, the mean gradient is that of `-(E_pi[s] - beta KL(pi || pi_0))` in the states that
    were sampled: what the tilted base policy maximises. Ours, for the paper's token rewards; the clip: arXiv
    1707.06347; truncated importance weights: arXiv 1802.01561. Finite even for infinite log-ratios.

    Args:
        logps: `(B, T)` log-probs of the sampled tokens under the policy that is trained, in nats.
        anchor_logps: `(B, T)` under pi_old, the policy as it was when the iteration began.
        sampler_logps: `(B, T)` under what drew them.
        signal: `(B, T)` of the sampled tokens, in nats: their advantage.
        kl: `(B, T)` KL of the policy that is trained to the base policy, in nats.
        beta: Price of a nat of KL to the base policy.
        epsilon_low: How far below 1 the ratio still has a gradient where the signal is negative.
        epsilon_high: How far above 1 it still has one where the signal is positive.
        truncate: Bound on the weight, above 0, which trades variance for bias.
    """
    most = min(MAX_EXPONENT, math.log(truncate))
    weights = (anchor_logps - sampler_logps).detach().clamp(max=most).exp()
    gain = -ppo_terms(logps, anchor_logps, signal, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return beta * kl - weights * gain


class StudentObjective(ABC):  # noqa: B024
    """What the distillation stage minimises: a `DistillObjective` or a `TokenObjective`, by what it is given."""


class DistillObjective(StudentObjective):
    """What the distillation stage minimises, over the support of every state."""

    @abstractmethod
    def __call__(self, student: Tensor, base: Tensor, signal: Tensor, beta: float) -> Tensor:
        """Terms to minimise, `(B, T)` and unmasked.

        Args:
            student: `(B, T, K+1)` log-probs of the policy that is trained, in nats.
            base: `(B, T, K+1)` log-probs of the base policy, in nats.
            signal: `(B, T, K+1)`, in nats.
            beta: Price of a nat of KL to the base policy.
        """


class TiltedTarget(DistillObjective):
    """`KL(pi_theta || pi*_beta)` to the tilted base policy, over support and tail. Ours."""

    def __call__(self, student: Tensor, base: Tensor, signal: Tensor, beta: float) -> Tensor:
        """`kl_to_target` of the tilted base policy: `(B, T)`, in nats."""
        return kl_to_target(student, tilt(base, signal, beta))


class TokenObjective(StudentObjective):
    """What the distillation stage minimises where the signal of the sampled tokens alone is asked for.

    Attributes:
        kl_term: Whether the KL to the base policy enters the terms; if not, none is measured for them.
    """

    kl_term = True

    @abstractmethod
    def __call__(
        self,
        logps: Tensor,
        anchor_logps: Tensor,
        sampler_logps: Tensor,
        signal: Tensor,
        kl: Tensor,
        beta: float,
    ) -> Tensor:
        """Terms to minimise, `(B, T)` and unmasked.

        Args:
            logps: `(B, T)` log-probs of the sampled tokens under the policy that is trained, in nats.
            anchor_logps: `(B, T)` under that policy as it was when the iteration began, in nats.
            sampler_logps: `(B, T)` under what drew them, in nats.
            signal: `(B, T)` of the sampled tokens, in nats.
            kl: `(B, T)` KL of the policy that is trained to the base policy, in nats; 0 without `kl_term`.
            beta: Price of a nat of KL to the base policy.
        """


class ClippedPolicyGradient(TokenObjective):
    """The signal of the sampled token as its advantage, clipped, and beta * KL to the base policy. Ours.

    See `clipped_policy_gradient_terms`. The clip sets the speed, beta the destination.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the signal is negative.
        epsilon_high: How far above 1 it still has one where the signal is positive.
        truncate: Bound on the importance weight of a token where trainer and sampler differ, as on stored rollouts.
        kl_term: Charge beta for each nat of KL to the base policy; without, the policy collapses.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        truncate: float = 2.0,
        kl_term: bool = True,
    ) -> None:
        check_clips(epsilon_low, epsilon_high)
        if not 0 < truncate < math.inf:
            raise ValueError(f"truncate is {truncate}; it has to be a positive number")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.truncate = truncate
        self.kl_term = kl_term

    def __call__(
        self,
        logps: Tensor,
        anchor_logps: Tensor,
        sampler_logps: Tensor,
        signal: Tensor,
        kl: Tensor,
        beta: float,
    ) -> Tensor:
        """`clipped_policy_gradient_terms`: `(B, T)`, in nats."""
        return clipped_policy_gradient_terms(
            logps,
            anchor_logps,
            sampler_logps,
            signal,
            kl,
            beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            truncate=self.truncate,
        )
