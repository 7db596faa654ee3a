"""Lightning callbacks, importable as `erpd_lightning.callbacks` and under no other name."""

from .throughput import Throughput

__all__ = ["Throughput"]
