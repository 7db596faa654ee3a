"""Objectives of both stages: pure tensor functions, and thin classes that carry their settings."""

from .advantages import group_advantages
from .distillation import DistillObjective, TiltedTarget, kl_to_target
from .divergences import entropy, exact_kl
from .extreme import SAPO, CrossEntropy, ExtremeObjective, cross_entropy_terms, flip, sapo_terms
from .reduction import masked_mean, masked_sum
from .signal import Signal, Term
from .tilt import LOG_ZERO, BetaSolution, UnreachableBudget, solve_beta, tilt, tilted_kl

# The function `tilt` hides the module of that name here; `from .tilt import ...` finds both.
__all__ = [
    "LOG_ZERO",
    "SAPO",
    "BetaSolution",
    "CrossEntropy",
    "DistillObjective",
    "ExtremeObjective",
    "Signal",
    "Term",
    "TiltedTarget",
    "UnreachableBudget",
    "cross_entropy_terms",
    "entropy",
    "exact_kl",
    "flip",
    "group_advantages",
    "kl_to_target",
    "masked_mean",
    "masked_sum",
    "sapo_terms",
    "solve_beta",
    "tilt",
    "tilted_kl",
]
