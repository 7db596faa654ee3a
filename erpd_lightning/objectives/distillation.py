"""Objectives of the distillation stage: the signal enters the base policy on a KL budget.

A loss is per token and unmasked. The caller masks and sums it, and divides once by the number of valid tokens of the
whole optimiser step. Supports are laid out as in `tilted_policy`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from .clipped import check_clip_range, clipped_surrogate
from .divergences import exact_kl
from .importance import importance_weights
from .shapes import check_shape
from .tilted_policy import tilt


class SupportObjective(ABC):
    """Loss of the distillation stage over the support of every state.

    Attributes:
        needs: What it takes: log-probs and signal over the support.

    Example:
        >>> class KLToBase(SupportObjective):
        ...     def __call__(self, student, base, signal, beta):
        ...         return exact_kl(student, base)
        >>> KLToBase().needs
        'support'
    """

    needs: Literal["support"] = "support"

    @abstractmethod
    def __call__(self, student: Tensor, base: Tensor, signal: Tensor, beta: float) -> Tensor:
        """Per-token loss to minimise, `(B, T)` and unmasked.

        Args:
            student: `(B, T, K+1)` log-probs of the policy that is trained, in nats.
            base: `(B, T, K+1)` log-probs of the base policy, in nats.
            signal: `(B, T, K+1)`, in nats.
            beta: Price of a nat of KL to the base policy.
        """


class TokenObjective(ABC):
    """Loss of the distillation stage from the sampled tokens and their signal alone.

    Attributes:
        needs: What it takes: log-probs and signal of the sampled tokens.
        kl_term: Whether the KL to the base policy enters the loss; if not, none is measured for it.

    Example:
        >>> class SignalTimesLogp(TokenObjective):
        ...     def __call__(self, logps, old_logps, sampler_logps, signal, kl, beta):
        ...         return beta * kl - signal * logps
        >>> SignalTimesLogp().needs
        'tokens'
    """

    needs: Literal["tokens"] = "tokens"
    kl_term: bool = True

    @abstractmethod
    def __call__(
        self, logps: Tensor, old_logps: Tensor, sampler_logps: Tensor, signal: Tensor, kl: Tensor, beta: float
    ) -> Tensor:
        """Per-token loss to minimise, `(B, T)` and unmasked.

        Args:
            logps: `(B, T)` log-probs of the sampled tokens under the policy that is trained, in nats.
            old_logps: `(B, T)` under pi_old, the policy as it was when the iteration began, in nats.
            sampler_logps: `(B, T)` under the distribution that they were drawn from, in nats.
            signal: `(B, T)` of the sampled tokens, in nats.
            kl: `(B, T)` KL of the policy that is trained to the base policy, in nats; 0 without `kl_term`.
            beta: Price of a nat of KL to the base policy.
        """


DistillObjective: TypeAlias = SupportObjective | TokenObjective
"""What the distillation stage can minimise; `needs` tells the two apart."""


@dataclass
class TiltedTarget(SupportObjective):
    """`KL(pi_theta || pi*_beta)` to the tilted base policy, per token, over support and tail. Ours.

    Example:
        >>> import torch
        >>> base, signal = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.0, math.log(3)]]])
        >>> TiltedTarget()(base, base, signal, beta=1.0)  # the target is (1/4, 3/4)
        tensor([[0.1438]])
    """

    def __call__(self, student: Tensor, base: Tensor, signal: Tensor, beta: float) -> Tensor:
        """Per-token loss `(B, T)`, in nats.

        Raises:
            ValueError: for tensors of different shapes.
        """
        check_shape(student.shape, base=base, signal=signal)
        return exact_kl(student, tilt(base, signal, beta))


@dataclass
class ClippedPolicyGradient(TokenObjective):
    """Clipped policy gradient with the sampled token's signal as its advantage, and a KL term, per token. Ours.

    `-w min(r s, clip(r, 1 - epsilon_low, 1 + epsilon_high) s) + beta KL(pi_theta || pi_0)` with the ratio
    `r = pi_theta / pi_old` and the weight `w = min(C, pi_old / pi_sampler)`, C being `truncate`. On tokens of the
    sampler, without clip and truncation, the mean gradient is that of `-(E_pi[s] - beta KL(pi || pi_0))` in the states
    that were sampled: what the tilted base policy maximises. The clip sets the speed, beta the destination. Finite even
    for infinite log-ratios.

    It is our reading of the paper's token rewards. The clip: arXiv 1707.06347; truncated importance weights: arXiv
    1802.01561.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the signal is negative.
        epsilon_high: How far above 1 it still has one where the signal is positive.
        truncate: Bound on the importance weight of a token where trainer and sampler differ, as on stored rollouts;
            it trades variance for bias.
        kl_term: Charge beta for each nat of KL to the base policy; without, the policy collapses.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> import torch
        >>> logps, signal, kl = torch.tensor([[-1.0, -2.0]]), torch.tensor([[3.0, -3.0]]), torch.full((1, 2), 0.5)
        >>> ClippedPolicyGradient()(logps, logps, logps, signal, kl, beta=0.2)
        tensor([[-2.9000,  3.1000]])
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    truncate: float = 2.0
    kl_term: bool = True

    def __post_init__(self) -> None:
        check_clip_range(self.epsilon_low, self.epsilon_high)
        if not 0 < self.truncate < math.inf:
            raise ValueError(f"truncate is {self.truncate}; it has to be a positive number")

    def __call__(
        self, logps: Tensor, old_logps: Tensor, sampler_logps: Tensor, signal: Tensor, kl: Tensor, beta: float
    ) -> Tensor:
        """Per-token loss `(B, T)`, in nats.

        Raises:
            ValueError: for tensors of different shapes.
        """
        check_shape(logps.shape, old_logps=old_logps, sampler_logps=sampler_logps, signal=signal, kl=kl)
        weights = importance_weights(old_logps, sampler_logps, self.truncate)
        signal = signal.to(logps.dtype)
        gain = clipped_surrogate(logps - old_logps, signal, self.epsilon_low, self.epsilon_high)
        return beta * kl - weights * gain
