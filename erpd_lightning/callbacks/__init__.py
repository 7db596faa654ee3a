"""Lightning callbacks, importable as `erpd_lightning.callbacks` and under no other name."""

from .collapse import CollapseMonitor, Limit
from .kl_budget import BudgetExceeded, KLBudget
from .progress import SamplingProgress
from .resume import ResumeCheckpoint
from .samples import SampleTable
from .throughput import Throughput

__all__ = [
    "BudgetExceeded",
    "CollapseMonitor",
    "KLBudget",
    "Limit",
    "ResumeCheckpoint",
    "SampleTable",
    "SamplingProgress",
    "Throughput",
]
