"""Metrics of policies and their responses: pure functions, and torchmetrics classes that share their maths.

They need torch and torchmetrics alone, in any Lightning module or without Lightning. What is kept over batches and
ranks are float64 sums, divided once at the end, so the result does not depend on how the data were split. What nobody
measured is NaN, never 0.
"""

from .answers import PassAtK, distinct_responses, majority_correct, pass_at_k
from .importance import (
    ImportanceStatistics,
    ImportanceSums,
    check_ratio_bounds,
    empty_importance_sums,
    importance_statistics,
    importance_sums,
    merge_importance_sums,
)
from .sums import ClusteredRatio, Ratio, clustered_ratio

__all__ = [
    "ClusteredRatio",
    "ImportanceStatistics",
    "ImportanceSums",
    "PassAtK",
    "Ratio",
    "check_ratio_bounds",
    "clustered_ratio",
    "distinct_responses",
    "empty_importance_sums",
    "importance_statistics",
    "importance_sums",
    "majority_correct",
    "merge_importance_sums",
    "pass_at_k",
]
