"""Truncated importance weights, which correct for tokens that were drawn from another distribution."""

import math

from torch import Tensor

from .shapes import check_shape

MAX_EXPONENT = 30.0
"""Nats. Exponents beyond are cut off: the square of exp(30), which the gradient's norm takes, leaves room for a sum in
float32."""


def importance_weights(logps: Tensor, sampler_logps: Tensor, truncate: float | None = None) -> Tensor:
    """Weights `min(C, p / p_sampler)` of tokens or of whole responses, without gradient.

    Source: truncated importance sampling, Ionides 2008; between a trainer and another engine that samples for it, as in
    TRL and verl, it corrects for what their log-probs differ by.

    Args:
        logps: `(...)` log-probs, in nats, under the distribution that an expectation is to be of.
        sampler_logps: `(...)` those under the distribution that was drawn from.
        truncate: C, the bound on a weight, which trades variance for bias; None for none.

    Raises:
        ValueError: for a bound that is not positive, or tensors of different shapes.

    Example:
        >>> import torch
        >>> importance_weights(torch.tensor([0.5, 0.1]).log(), torch.tensor([0.1, 0.2]).log(), truncate=2.0)
        tensor([2.0000, 0.5000])
    """
    if truncate is not None and not truncate > 0:
        raise ValueError(f"truncate is {truncate}; it has to be positive, or None for the full weight")
    check_shape(logps.shape, sampler_logps=sampler_logps)
    max_log_weight = MAX_EXPONENT if truncate is None else min(MAX_EXPONENT, math.log(truncate))
    return (logps - sampler_logps).detach().clamp(max=max_log_weight).exp()
