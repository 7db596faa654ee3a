"""Lightning callbacks, importable as `erpd_lightning.callbacks` and under no other name."""

from .resume import ResumeCheckpoint
from .throughput import Throughput

__all__ = ["ResumeCheckpoint", "Throughput"]
