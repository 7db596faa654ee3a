"""Objectives of the extreme region stage that clip the importance ratio `pi / pi_old`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .extreme import MAX_LOG_RATIO, AdvantageObjective, check_batch
from .shapes import check_shape

# Nats. Nothing bounds the ratio of a response with a negative advantage, so its gradient is bounded here: the square of
# exp(30), which the gradient's norm takes, leaves room for a sum in float32.
MAX_LOG_WEIGHT = 30.0


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's surrogate to maximise, `min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`: `(...)`.

    With `r = exp(log_ratio)`. With `dual_clip` = c, it is at least `c A` where the advantage is negative: a large
    ratio has no gradient then. Finite even for an infinite log-ratio, where the gradient is 0. Source: arXiv
    1707.06347; bounds that differ: arXiv 2503.14476; dual clip: arXiv 1912.09729.

    Args:
        log_ratio: `(...)`, `log pi - log pi_old`, in nats.
        advantages: `(...)`, one for each ratio.
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative.
        epsilon_high: How far above 1 it still has one where the advantage is positive.
        dual_clip: Bound on the ratio where the advantage is negative, above 1; None for none.

    Raises:
        ValueError: for advantages of another shape than the log-ratio's.

    Example:
        >>> clipped_surrogate(torch.tensor([0.5, 1.5]).log(), torch.tensor([1.0, 1.0]), 0.2, 0.2)
        tensor([0.5000, 1.2000])
    """
    check_shape(log_ratio.shape, advantages=advantages)
    ratio = log_ratio.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return gain


def check_clip_range(epsilon_low: float, epsilon_high: float) -> None:
    """Refuse bounds of a ratio that are out of range.

    Raises:
        ValueError: begins with the bound's name.

    Example:
        >>> check_clip_range(epsilon_low=1.5, epsilon_high=0.2)
        Traceback (most recent call last):
        ValueError: epsilon_low is 1.5; it has to be above 0 and at most 1
    """
    if not 0 < epsilon_low <= 1:
        raise ValueError(f"epsilon_low is {epsilon_low}; it has to be above 0 and at most 1")
    if not 0 < epsilon_high < math.inf:
        raise ValueError(f"epsilon_high is {epsilon_high}; it has to be a positive number")


@dataclass
class PPOClip(AdvantageObjective):
    """PPO's clipped surrogate, per token: `-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`.

    `r = exp(logps - old_logps)`; see `clipped_surrogate`. Source: arXiv 1707.06347.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative.
        epsilon_high: How far above 1 it still has one where the advantage is positive; 0.28 in DAPO
            (arXiv 2503.14476), which keeps more of the entropy.
        dual_clip: Bound on the ratio where the advantage is negative (arXiv 1912.09729, which takes 3); null for none.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> logps, mask = torch.tensor([[0.5, 1.5]]).log(), torch.ones(1, 2).bool()
        >>> PPOClip()(logps, torch.zeros(1, 2), mask, rewards=torch.ones(1), advantages=torch.ones(1))
        tensor([[-0.5000, -1.2000]])
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_clip_range(self.epsilon_low, self.epsilon_high)
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip is {self.dual_clip}; it has to be above 1, or null for none")

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Per-token loss `(B, T)`; the rewards count only through the advantages."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        advantages = advantages.to(logps.dtype)[:, None].expand_as(logps)
        return -clipped_surrogate(logps - old_logps, advantages, self.epsilon_low, self.epsilon_high, self.dual_clip)


@dataclass
class GSPO(AdvantageObjective):
    """Group sequence policy optimisation, per response: `-min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A)`.

    `s = exp(mean_t(logps - old_logps))`, the mean over the tokens of a response; see `clipped_surrogate`. Finite even
    for an infinite log-ratio. Source: arXiv 2507.18071.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative. The ratio is
            a geometric mean over the response, so this is far smaller than PPO's; the paper's value.
        epsilon_high: How far above 1 it still has one where the advantage is positive; the paper's value.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> logps, mask = torch.tensor([[2.0, 8.0]]).log(), torch.ones(1, 2).bool()  # geometric mean 4
        >>> GSPO()(logps, torch.zeros(1, 2), mask, rewards=torch.zeros(1), advantages=-torch.ones(1))
        tensor([4.])
    """

    per = "response"

    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4

    def __post_init__(self) -> None:
        check_clip_range(self.epsilon_low, self.epsilon_high)

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Per-response loss `(B,)`; the rewards count only through the advantages."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        log_ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        mean = torch.where(mask, log_ratio, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
        return -clipped_surrogate(mean, advantages.to(logps.dtype), self.epsilon_low, self.epsilon_high)


@dataclass
class CISPO(AdvantageObjective):
    """Clipped importance weights, per token: `-sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A log pi`.

    `r = exp(logps - old_logps)` and sg is the stop-gradient: no token loses its gradient to the clip. Finite even
    for an infinite log-ratio. Source: arXiv 2506.13585.

    Args:
        epsilon_low: How far below 1 the weight of a token may fall; 1 for no bound, as in the paper.
        epsilon_high: How far above 1 it may rise. The paper leaves its value open; at 4 the weight is at most 5,
            as in arXiv 2510.13786.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> logps, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
        >>> CISPO()(logps, logps, mask, rewards=torch.ones(1), advantages=torch.ones(1))
        tensor([[1., 2.]])
    """

    epsilon_low: float = 1.0
    epsilon_high: float = 4.0

    def __post_init__(self) -> None:
        check_clip_range(self.epsilon_low, self.epsilon_high)

    def __call__(self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Per-token loss `(B, T)`; the rewards count only through the advantages."""
        check_batch(logps, old_logps, mask, rewards, advantages)
        log_ratio = (logps - old_logps).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weight = log_ratio.exp().clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return -weight * advantages.to(logps.dtype)[:, None] * logps.clamp(min=-MAX_LOG_RATIO)
