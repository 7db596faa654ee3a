"""Objectives of the extreme region stage that clip the importance ratio `pi / pi_anchor`."""

import math

import torch
from torch import Tensor

from .extreme import MAX_LOG_RATIO, AdvantageObjective

# Nothing bounds the ratio of a response with a negative advantage, so its gradient is bounded here: the square of
# exp(30), which the gradient's norm takes, leaves room for a sum in float32.
MAX_LOG_WEIGHT = 30.0


def ppo_terms(
    logps: Tensor,
    anchor_logps: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """`-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`, `r = exp(logps - anchor_logps)`: `(B, T)`.

    With `dual_clip` = c, the term of a negative advantage is at most `-c A`: a large ratio has no gradient then.
    Finite even for an infinite log-ratio, where the gradient is 0. Source: arXiv 1707.06347; bounds that differ:
    arXiv 2503.14476; dual clip: arXiv 1912.09729.

    Args:
        logps: `(B, T)` of the policy that is trained, in nats.
        anchor_logps: `(B, T)` of the policy the importance ratio refers to, in nats.
        advantages: `(B,)`, one for all tokens of a response, or `(B, T)`.
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative.
        epsilon_high: How far above 1 it still has one where the advantage is positive.
        dual_clip: Bound on the ratio where the advantage is negative, above 1; None for none.
    """
    advantages = advantages.to(logps.dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ratio = (logps - anchor_logps).clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    return _clipped(ratio, advantages, epsilon_low, epsilon_high, dual_clip)


def gspo_terms(
    logps: Tensor,
    anchor_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Tensor:
    """`-min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A)`, `s = exp(mean_t log r_t)`: `(B,)`.

    The mean is over the tokens of a response. Finite even for an infinite log-ratio. Source: arXiv 2507.18071.

    Args:
        logps: `(B, T)` of the policy that is trained, in nats.
        anchor_logps: `(B, T)` of the policy the importance ratio refers to, in nats.
        mask: `(B, T)` bool, True on response tokens.
        advantages: `(B,)`.
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative.
        epsilon_high: How far above 1 it still has one where the advantage is positive.
    """
    log_ratio = (logps - anchor_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    mean = torch.where(mask, log_ratio, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = mean.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    return _clipped(ratio, advantages.to(logps.dtype), epsilon_low, epsilon_high, None)


def cispo_terms(
    logps: Tensor,
    anchor_logps: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 1.0,
    epsilon_high: float = 4.0,
) -> Tensor:
    """`-sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A log pi`, sg the stop-gradient: `(B, T)`.

    No token loses its gradient to the clip. Finite even for an infinite log-ratio. Source: arXiv 2506.13585.

    Args:
        logps: `(B, T)` of the policy that is trained, in nats.
        anchor_logps: `(B, T)` of the policy the importance ratio refers to, in nats.
        advantages: `(B,)`, one for all tokens of a response.
        epsilon_low: How far below 1 the weight of a token may fall; 1 for no bound.
        epsilon_high: How far above 1 it may rise.
    """
    log_ratio = (logps - anchor_logps).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = log_ratio.exp().clamp(1 - epsilon_low, 1 + epsilon_high)
    return -weight * advantages.to(logps.dtype)[:, None] * logps.clamp(min=-MAX_LOG_RATIO)


def _clipped(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None
) -> Tensor:
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


class PPOClip(AdvantageObjective):
    """The clipped surrogate of PPO (arXiv 1707.06347), per token; see `ppo_terms`.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative.
        epsilon_high: How far above 1 it still has one where the advantage is positive; 0.28 in DAPO
            (arXiv 2503.14476), which keeps more of the entropy.
        dual_clip: Bound on the ratio where the advantage is negative (arXiv 1912.09729, which takes 3); null for none.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None) -> None:
        check_clips(epsilon_low, epsilon_high)
        if dual_clip is not None and not 1 < dual_clip < math.inf:
            raise ValueError(f"dual_clip is {dual_clip}; it has to be above 1, or null for none")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.dual_clip = dual_clip

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`ppo_terms`; the rewards count only through the advantages."""
        return ppo_terms(
            logps,
            anchor_logps,
            advantages,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            dual_clip=self.dual_clip,
        )


class GSPO(AdvantageObjective):
    """Group sequence policy optimisation (arXiv 2507.18071), per response; see `gspo_terms`.

    Args:
        epsilon_low: How far below 1 the ratio still has a gradient where the advantage is negative. The ratio is
            a geometric mean over the response, so this is far smaller than PPO's; the paper's value.
        epsilon_high: How far above 1 it still has one where the advantage is positive; the paper's value.

    Raises:
        ValueError: for a value out of range.
    """

    per = "response"

    def __init__(self, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4) -> None:
        check_clips(epsilon_low, epsilon_high)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`gspo_terms`; the rewards count only through the advantages."""
        return gspo_terms(
            logps,
            anchor_logps,
            mask,
            advantages,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
        )


class CISPO(AdvantageObjective):
    """Clipped importance weights on the log-prob (arXiv 2506.13585), per token; see `cispo_terms`.

    Args:
        epsilon_low: How far below 1 the weight of a token may fall; 1 for no bound, as in the paper.
        epsilon_high: How far above 1 it may rise. The paper leaves its value open; at 4 the weight is at most 5,
            as in arXiv 2510.13786.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, epsilon_low: float = 1.0, epsilon_high: float = 4.0) -> None:
        check_clips(epsilon_low, epsilon_high)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def __call__(
        self, logps: Tensor, anchor_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        """`cispo_terms`; the rewards count only through the advantages."""
        return cispo_terms(
            logps,
            anchor_logps,
            advantages,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
        )


def check_clips(epsilon_low: float, epsilon_high: float) -> None:
    """Refuse bounds of a ratio that are out of range.

    Raises:
        ValueError: names the bound.
    """
    if not 0 < epsilon_low <= 1:
        raise ValueError(f"epsilon_low is {epsilon_low}; it has to be above 0 and at most 1")
    if not 0 < epsilon_high < math.inf:
        raise ValueError(f"epsilon_high is {epsilon_high}; it has to be a positive number")
