"""Metrics of policies and their responses: torchmetrics classes, each with a function that shares its maths.

Usable on their own: they need torch and torchmetrics, and nothing that is said of a run. The classes keep float64
sums and divide in `compute` alone, so the result does not depend on how the data were split over batches and ranks.
What nobody measured is NaN, never 0.
"""

from .answers import DistinctShare, MajorityVote, PassAtK, distinct_responses, distinct_share, majority_vote, pass_at_k
from .importance import EffectiveSampleSize, RatioTail, Tail, effective_sample_size, ratio_tail
from .sums import ClusteredRatio, Ratio, clustered_ratio
from .tokens import MeanEntropy, MeanKL, MeanLength, TruncatedShare, mean_entropy, mean_kl, mean_length, truncated_share

__all__ = [
    "ClusteredRatio",
    "DistinctShare",
    "EffectiveSampleSize",
    "MajorityVote",
    "MeanEntropy",
    "MeanKL",
    "MeanLength",
    "PassAtK",
    "Ratio",
    "RatioTail",
    "Tail",
    "TruncatedShare",
    "clustered_ratio",
    "distinct_responses",
    "distinct_share",
    "effective_sample_size",
    "majority_vote",
    "mean_entropy",
    "mean_kl",
    "mean_length",
    "pass_at_k",
    "ratio_tail",
    "truncated_share",
]
