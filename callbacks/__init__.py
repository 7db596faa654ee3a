"""Lightning callbacks, importable as `erpd_lightning.callbacks` and under no other name."""

from .kl_budget import BudgetExceeded, KLBudget
from .resume import ResumeCheckpoint
from .throughput import Throughput

__all__ = ["BudgetExceeded", "KLBudget", "ResumeCheckpoint", "Throughput"]
