"""Objectives of the distillation stage: the signal enters the base policy on a KL budget.

The terms are per token and unmasked. The caller masks and sums them, and divides once by the number
of valid tokens of the whole optimiser step. Supports are laid out as in `tilt`.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from .divergences import exact_kl
from .tilt import tilt


def kl_to_target(student: Tensor, target: Tensor) -> Tensor:
    """`KL(pi_theta || pi*)` over support and tail, in nats: `(B, T, K+1)` log-probs to `(B, T)`."""
    return exact_kl(student, target)


class DistillObjective(ABC):
    """What the distillation stage minimises."""

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
