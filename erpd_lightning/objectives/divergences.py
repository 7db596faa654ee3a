"""Divergences, in nats: exact over the last dimension, or estimated from what was sampled.

The estimators k1, k2 and k3 are those of Schulman (joschu.net/blog/kl-approx.html). With `l = log p - log q` of a
sample of p, `k1 = l`, `k2 = l^2 / 2` and `k3 = 1/e^l - 1 + l`. They are elementwise: log-probs of tokens give the KL
of next tokens, sums of them over a response give the KL of responses.

A correct mean says nothing about its gradient, because the samples depend on the policy too. So values and
losses are two functions, and `check_kl_loss` knows which losses there are (cf. arXiv 2505.17508, 2512.21852).
"""

from typing import Literal

import torch
from torch import Tensor

from .importance import MAX_EXPONENT, importance_weights
from .shapes import check_shape

MAX_LOG_RATIO = 1e4
"""Nats. Log-ratios as they stand, without exponential, may be longer than `MAX_EXPONENT`: those of responses are."""

Direction = Literal["reverse", "forward"]
Estimator = Literal["k1", "k2", "k3"]

# With pi the policy, q the reference, g = grad log pi, and E_pi[g] = 0:
# reverse  k1: E_pi[g] = 0        k2: E_pi[g log(pi/q)]: correct  k3: E_pi[(1 - q/pi) g] = -E_q[g]: the forward KL's
# forward  k1: -E_q[g]: correct   k2: -E_q[g log(q/pi)]: no KL's  k3: E_q[(pi/q - 1) g] = -E_q[g]: correct
INVALID_LOSSES = {
    ("reverse", "k1"): "its gradient is zero on average; take exact or k2",
    ("reverse", "k3"): "its gradient is that of the forward KL; take exact or k2",
    ("forward", "k2"): "its gradient is that of no KL; take exact, k1 or k3",
}


def exact_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """`KL(p || q) = sum p (log p - log q)` over the last dimension: `(..., V)` to `(...)`, in nats.

    Entries with p = 0 contribute 0 to the value and to the gradient, whatever q is there. The
    result is infinite where q = 0 < p.

    Raises:
        ValueError: for tensors of different shapes.

    Example:
        >>> exact_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
        tensor(0.1438)
    """
    check_shape(logp.shape, logq=logq)
    possible = logp.exp() > 0
    # Replaced before the product: 0 * inf is NaN, and stays NaN in the gradient of a later `where`.
    logp, logq = torch.where(possible, logp, 0.0), torch.where(possible, logq, 0.0)
    return torch.where(possible, logp.exp() * (logp - logq), 0.0).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """`-sum p log p` over the last dimension: `(..., V)` to `(...)`, in nats.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    return -exact_kl(logp, torch.zeros_like(logp))


def kl_value(
    logp: Tensor,
    logq: Tensor,
    estimator: Estimator,
    *,
    sampler_logps: Tensor | None = None,
    truncate: float | None = None,
) -> Tensor:
    """`KL(p || q)` estimated from samples, in nats: `(...)` log-probs to `(...)`, without gradient.

    The mean of k1 and of k3 is exact with full weights; that of k2 is off by the order of `l^3`. k3 is at least 0.
    Finite even for infinite log-ratios.

    Args:
        logp: `(...)` log-probs under p of what was sampled, in nats.
        logq: `(...)` log-probs under q.
        estimator: Which of the estimators.
        sampler_logps: `(...)` log-probs under the policy that sampled, which each estimate is corrected for by the
            weight `p / sampler`; None where p did.
        truncate: Bound on the weight, above 0, which trades variance for bias; None for the full weight.

    Raises:
        ValueError: for tensors of different shapes, or a bound that is not positive.

    Example:
        >>> kl_value(torch.tensor([0.6]).log(), torch.tensor([0.3]).log(), "k3")  # log 2 - 1 / 2
        tensor([0.1931])
    """
    check_shape(logp.shape, logq=logq)
    return _weighted((logp - logq).detach(), _weights(logp, sampler_logps, truncate), estimator)


def kl_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    direction: Direction,
    estimator: Estimator,
    sampler_logps: Tensor | None = None,
    truncate: float | None = None,
) -> Tensor:
    """Loss of each sample whose mean gradient, with full weights, is that of a KL: `(...)` log-probs to `(...)`.

    `reverse` is `KL(policy || reference)`, from samples of the policy, `forward` is `KL(reference || policy)`, from
    samples of the reference; the weight of other samples carries no gradient. The gradient is that at the sampled
    states, and not of how likely they are; summed over responses, log-probs give the gradient of both. The value
    of k2 is not the KL's. Finite even for infinite log-ratios, where the log-ratio itself has gradient 0.

    Args:
        logps: `(...)` log-probs under the policy that is trained of what was sampled, in nats.
        ref_logps: `(...)` log-probs under the reference.
        direction: Which KL.
        estimator: Which of the estimators.
        sampler_logps: `(...)` log-probs under the policy that sampled; None where the policy (`reverse`) or the
            reference (`forward`) did.
        truncate: Bound on the weight, above 0, which trades variance for bias; None for the full weight.

    Raises:
        ValueError: for an estimator whose gradient is not that of this direction (see `check_kl_loss`), tensors of
            different shapes, or a bound that is not positive.

    Example:
        >>> logps = torch.tensor([0.6]).log()
        >>> kl_loss(logps, torch.tensor([0.3]).log(), direction="reverse", estimator="k2")  # (log 2)^2 / 2
        tensor([0.2402])
    """
    check_kl_loss(direction, estimator)
    check_shape(logps.shape, ref_logps=ref_logps)
    logp, logq = (logps, ref_logps) if direction == "reverse" else (ref_logps, logps)
    return _weighted(logp - logq, _weights(logp, sampler_logps, truncate), estimator)


def check_kl_loss(direction: str, estimator: str) -> None:
    """Refuse an estimator that is no loss for this direction of the KL; `exact` always is one.

    Raises:
        ValueError: for an unknown name, or an estimator whose gradient is another one or zero.

    Example:
        >>> check_kl_loss("forward", "k3")
        >>> check_kl_loss("reverse", "k1")
        Traceback (most recent call last):
        ValueError: k1 is no loss for the reverse KL: its gradient is zero on average; take exact or k2
    """
    if direction not in ("reverse", "forward"):
        raise ValueError(f"the direction is {direction!r}; it has to be reverse or forward")
    if estimator not in ("exact", "k1", "k2", "k3"):
        raise ValueError(f"the estimator is {estimator!r}; it has to be exact, k1, k2 or k3")
    if reason := INVALID_LOSSES.get((direction, estimator)):
        raise ValueError(f"{estimator} is no loss for the {direction} KL: {reason}")


def _weights(logp: Tensor, sampler_logps: Tensor | None, truncate: float | None) -> Tensor | None:
    if truncate is not None and not truncate > 0:
        raise ValueError(f"truncate is {truncate}; it has to be positive, or None for the full weight")
    if sampler_logps is None:
        return None
    return importance_weights(logp, sampler_logps, truncate)


def _weighted(log_ratio: Tensor, weights: Tensor | None, estimator: Estimator) -> Tensor:
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        estimates = bounded
    elif estimator == "k2":
        estimates = bounded.square() / 2
    else:
        estimates = torch.expm1((-log_ratio).clamp(max=MAX_EXPONENT)) + bounded
    return estimates if weights is None else weights * estimates
