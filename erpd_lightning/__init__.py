"""Extreme Region Policy Distillation (arXiv 2605.25582) on Lightning.

The public names below are imported when they are first used, so that `import erpd_lightning` does
not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.rollouts import RolloutDataModule
    from .data.sources import PromptSource
    from .errors import UserError
    from .modules.distill import DistillModule
    from .modules.evaluation import EvaluationModule
    from .modules.extreme_region import ExtremeRegionModule
    from .modules.policy_module import PolicyModule
    from .objectives.clipped import CISPO, GSPO, PPOClip
    from .objectives.distillation import ClippedPolicyGradient, TiltedTarget
    from .objectives.extreme import SAPO, CrossEntropy
    from .objectives.regression import SquaredError
    from .objectives.signal import AutoSignal, Signal, Term

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "GSPO",
    "SAPO",
    "AutoSignal",
    "ClippedPolicyGradient",
    "CrossEntropy",
    "DistillModule",
    "EvaluationModule",
    "ExtremeRegionModule",
    "PPOClip",
    "PolicyModule",
    "PromptSource",
    "RolloutDataModule",
    "Signal",
    "SquaredError",
    "Term",
    "TiltedTarget",
    "UserError",
    "__version__",
]

_HOMES = {
    "CISPO": ".objectives.clipped",
    "GSPO": ".objectives.clipped",
    "PPOClip": ".objectives.clipped",
    "AutoSignal": ".objectives.signal",
    "SAPO": ".objectives.extreme",
    "ClippedPolicyGradient": ".objectives.distillation",
    "CrossEntropy": ".objectives.extreme",
    "DistillModule": ".modules.distill",
    "EvaluationModule": ".modules.evaluation",
    "ExtremeRegionModule": ".modules.extreme_region",
    "PolicyModule": ".modules.policy_module",
    "PromptSource": ".data.sources",
    "RolloutDataModule": ".data.rollouts",
    "Signal": ".objectives.signal",
    "SquaredError": ".objectives.regression",
    "Term": ".objectives.signal",
    "TiltedTarget": ".objectives.distillation",
    "UserError": ".errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
