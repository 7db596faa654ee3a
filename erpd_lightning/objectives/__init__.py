"""Objectives of both stages: pure tensor functions, and thin classes that carry their settings."""

from .advantages import group_advantages
from .clipped import CISPO, GSPO, PPOClip, cispo_terms, gspo_terms, ppo_terms
from .distillation import (
    ClippedPolicyGradient,
    DistillObjective,
    StudentObjective,
    TiltedTarget,
    TokenObjective,
    clipped_policy_gradient_terms,
    kl_to_target,
)
from .divergences import check_kl_loss, entropy, exact_kl, kl_loss, kl_value
from .extreme import SAPO, AdvantageObjective, CrossEntropy, ExtremeObjective, cross_entropy_terms, flip, sapo_terms
from .reduction import masked_mean, masked_sum
from .regression import SquaredError, squared_error_terms
from .signal import Signal, Term
from .tilted_policy import (
    LOG_ZERO,
    BetaSolution,
    TwoAnchorSolution,
    UnreachableBudget,
    mean_tilted_kl,
    solve_beta,
    solve_two_anchors,
    tilt,
    tilt_two_anchors,
    tilted_kl,
)

# The function `tilt` hides the module of that name here; `from .tilt import ...` finds both.
__all__ = [
    "CISPO",
    "GSPO",
    "LOG_ZERO",
    "SAPO",
    "AdvantageObjective",
    "BetaSolution",
    "ClippedPolicyGradient",
    "CrossEntropy",
    "DistillObjective",
    "ExtremeObjective",
    "PPOClip",
    "Signal",
    "SquaredError",
    "StudentObjective",
    "Term",
    "TiltedTarget",
    "TokenObjective",
    "TwoAnchorSolution",
    "UnreachableBudget",
    "check_kl_loss",
    "cispo_terms",
    "clipped_policy_gradient_terms",
    "cross_entropy_terms",
    "entropy",
    "exact_kl",
    "flip",
    "group_advantages",
    "gspo_terms",
    "kl_loss",
    "kl_to_target",
    "kl_value",
    "masked_mean",
    "masked_sum",
    "mean_tilted_kl",
    "ppo_terms",
    "sapo_terms",
    "solve_beta",
    "solve_two_anchors",
    "squared_error_terms",
    "tilt",
    "tilt_two_anchors",
    "tilted_kl",
]
