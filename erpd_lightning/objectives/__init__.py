"""Objectives of both stages: pure tensor functions, and dataclasses that hold their settings and their mathematics."""

from .advantages import group_advantages
from .clipped import CISPO, GSPO, PPOClip, clipped_surrogate
from .distillation import ClippedPolicyGradient, DistillObjective, SupportObjective, TiltedTarget, TokenObjective
from .divergences import check_kl_loss, entropy, exact_kl, kl_loss, kl_value
from .extreme import SAPO, AdvantageObjective, CrossEntropy, ExtremeObjective, flip_outcomes
from .importance import importance_weights
from .reduction import masked_sum
from .regression import SquaredError
from .signal import AutoSignal, Signal, Term
from .tilted_policy import (
    LOG_ZERO,
    BetaSolution,
    UnreachableBudget,
    mean_tilted_kl,
    solve_beta,
    tilt,
    tilted_kl,
)
from .two_references import TwoReferenceSolution, geometric_mixture, solve_two_references, tilt_two_references

__all__ = [
    "CISPO",
    "GSPO",
    "LOG_ZERO",
    "SAPO",
    "AdvantageObjective",
    "AutoSignal",
    "BetaSolution",
    "ClippedPolicyGradient",
    "CrossEntropy",
    "DistillObjective",
    "ExtremeObjective",
    "PPOClip",
    "Signal",
    "SquaredError",
    "SupportObjective",
    "Term",
    "TiltedTarget",
    "TokenObjective",
    "TwoReferenceSolution",
    "UnreachableBudget",
    "check_kl_loss",
    "clipped_surrogate",
    "entropy",
    "exact_kl",
    "flip_outcomes",
    "geometric_mixture",
    "group_advantages",
    "importance_weights",
    "kl_loss",
    "kl_value",
    "masked_sum",
    "mean_tilted_kl",
    "solve_beta",
    "solve_two_references",
    "tilt",
    "tilt_two_references",
    "tilted_kl",
]
