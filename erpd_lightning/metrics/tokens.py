"""Means over the tokens of responses, with standard errors by prompts: KL, entropy, length, truncation.

Responses are rows of padded tensors: `mask`, (B, T) bool, is True on their tokens, and what stands elsewhere is not
read, be it NaN. A row without tokens is filler and counts as no response. `prompts`, (B,) long, numbers each row's
prompt; None where every response has a prompt of its own. Values are the same however rows are split over calls;
standard errors are right where all responses to a prompt come in one call.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ..objectives.divergences import Estimator, entropy, exact_kl, kl_value
from .sums import ClusterSums, Ratio, clustered_ratio

Unit = Literal["token", "response"]


def mean_kl(
    logp: Tensor,
    logq: Tensor,
    mask: Tensor,
    prompts: Tensor | None = None,
    *,
    estimator: Estimator | Literal["exact"],
    per: Unit = "token",
    log_sampler: Tensor | None = None,
    truncate: float | None = None,
) -> Ratio:
    """`KL(p || q)` of next tokens, at the states that were sampled: in nats per token or per response.

    Per token it is the mean over all tokens, per response the mean of the sums over a response, which is the KL of
    responses where p sampled them. The estimators are those of `objectives.divergences.kl_value`.

    Corrected for another sampler, each token has the weight `p / sampler` of its own: the states stay the sampler's.
    Log-probs summed over responses, as (B, 1), are estimated and corrected as a whole.

    Args:
        logp: (B, T) log-probs under p of the sampled tokens in nats; (B, T, V), of the whole vocabulary, for `exact`.
        logq: log-probs under q, of the same shape.
        mask: (B, T) bool.
        prompts: (B,) long, or None.
        estimator: `exact`, `k1`, `k2` or `k3`.
        per: the denominator, `token` or `response`.
        log_sampler: (B, T) log-probs under the policy that sampled; None where p did, and for `exact`.
        truncate: bound on the weight, above 0, which trades variance for bias; None for the full weight.

    Raises:
        ValueError: if a name is unknown, shapes do not fit, or `exact` is given what it has no use for.
    """
    _check_kl(estimator, per, truncate)
    return clustered_ratio(*_kl_sums(logp, logq, mask, prompts, estimator, per, log_sampler, truncate))


class MeanKL(ClusterSums):
    """`mean_kl` of all responses seen; NaN without any token.

    Args:
        estimator: as in `mean_kl`.
        per: likewise.
        truncate: likewise.
        **kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: as `mean_kl` does.
    """

    def __init__(
        self,
        estimator: Estimator | Literal["exact"],
        per: Unit = "token",
        truncate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_kl(estimator, per, truncate)
        self.estimator, self.per, self.truncate = estimator, per, truncate

    def update(
        self,
        logp: Tensor,
        logq: Tensor,
        mask: Tensor,
        prompts: Tensor | None = None,
        log_sampler: Tensor | None = None,
    ) -> None:
        """Adds responses, as in `mean_kl`."""
        self.add(*_kl_sums(logp, logq, mask, prompts, self.estimator, self.per, log_sampler, self.truncate))


def _check_kl(estimator: str, per: str, truncate: float | None) -> None:
    if estimator not in ("exact", "k1", "k2", "k3"):
        raise ValueError(f"the estimator is {estimator!r}; it has to be exact, k1, k2 or k3")
    if per not in ("token", "response"):
        raise ValueError(f"the KL is per {per!r}; it has to be per token or per response")
    if truncate is not None and (estimator == "exact" or not truncate > 0):
        raise ValueError(f"truncate is {truncate}; it has to be positive, and None for exact, which has no weight")


def _kl_sums(
    logp: Tensor,
    logq: Tensor,
    mask: Tensor,
    prompts: Tensor | None,
    estimator: Estimator | Literal["exact"],
    per: Unit,
    log_sampler: Tensor | None,
    truncate: float | None,
) -> tuple[Tensor, Tensor]:
    _check_fits("log-probs", logp, (*mask.shape, *logp.shape[-1:]) if estimator == "exact" else mask.shape)
    _check_fits("log-probs of the other policy", logq, logp.shape)
    if estimator == "exact":
        if log_sampler is not None:
            raise ValueError("the exact KL is over the whole vocabulary: leave out log_sampler, there is no weight")
        values = exact_kl(_precise(logp), _precise(logq))
    else:
        if log_sampler is not None:
            _check_fits("log-probs of the sampler", log_sampler, mask.shape)
            log_sampler = log_sampler.double()
        values = kl_value(logp.double(), logq.double(), estimator, sampler_logps=log_sampler, truncate=truncate)
    return _prompt_sums(_token_sums(values, mask), _count(mask, per), mask, prompts)


def mean_entropy(values: Tensor, mask: Tensor, prompts: Tensor | None = None) -> Ratio:
    """Entropy of next tokens, in nats per token.

    Args:
        values: (B, T) entropies in nats, or (B, T, V) logits.
        mask: (B, T) bool.
        prompts: (B,) long, or None.

    Raises:
        ValueError: if shapes do not fit.
    """
    return clustered_ratio(*_entropy_sums(values, mask, prompts))


class MeanEntropy(ClusterSums):
    """`mean_entropy` of all responses seen; NaN without any token."""

    def update(self, values: Tensor, mask: Tensor, prompts: Tensor | None = None) -> None:
        """Adds responses, as in `mean_entropy`."""
        self.add(*_entropy_sums(values, mask, prompts))


def _entropy_sums(values: Tensor, mask: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    if values.ndim == mask.ndim + 1:
        values = entropy(_precise(values).log_softmax(-1))
    _check_fits("entropies", values, mask.shape)
    return _prompt_sums(_token_sums(values, mask), _count(mask, "token"), mask, prompts)


def mean_length(mask: Tensor, prompts: Tensor | None = None) -> Ratio:
    """Tokens per response.

    Args:
        mask: (B, T) bool.
        prompts: (B,) long, or None.
    """
    return clustered_ratio(*_length_sums(mask, prompts))


class MeanLength(ClusterSums):
    """`mean_length` of all responses seen; NaN without any."""

    def update(self, mask: Tensor, prompts: Tensor | None = None) -> None:
        """Adds responses, as in `mean_length`."""
        self.add(*_length_sums(mask, prompts))


def _length_sums(mask: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    return _prompt_sums(_count(mask, "token"), _count(mask, "response"), mask, prompts)


def truncated_share(truncated: Tensor, mask: Tensor, prompts: Tensor | None = None) -> Ratio:
    """Share of responses that were cut off.

    Args:
        truncated: (B,) bool, whether a response was cut off at the greatest length that it might have.
        mask: (B, T) bool.
        prompts: (B,) long, or None.

    Raises:
        ValueError: if shapes do not fit.
    """
    return clustered_ratio(*_truncated_sums(truncated, mask, prompts))


class TruncatedShare(ClusterSums):
    """`truncated_share` of all responses seen; NaN without any."""

    higher_is_better = False

    def update(self, truncated: Tensor, mask: Tensor, prompts: Tensor | None = None) -> None:
        """Adds responses, as in `truncated_share`."""
        self.add(*_truncated_sums(truncated, mask, prompts))


def _truncated_sums(truncated: Tensor, mask: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_fits("truncated", truncated, mask.shape[:1])
    return _prompt_sums(truncated, _count(mask, "response"), mask, prompts)


def _precise(values: Tensor) -> Tensor:
    """At least float32: a sum over a vocabulary is none in half precision. Not more, for it is large."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _token_sums(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.detach().double(), 0.0).sum(-1)


def _count(mask: Tensor, per: Unit) -> Tensor:
    return mask.sum(-1) if per == "token" else mask.any(-1)


def _prompt_sums(numerator: Tensor, denominator: Tensor, mask: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,) numbers of each row to (P,) sums over each prompt's, without rows of filler."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"the mask has to be bool of shape (B, T), got {mask.dtype} of {tuple(mask.shape)}")
    prompts = torch.arange(len(mask), device=mask.device) if prompts is None else prompts
    _check_fits("prompts", prompts, mask.shape[:1])
    kept = mask.any(-1)
    numbers, index = prompts[kept].unique(return_inverse=True)
    sums = torch.zeros(2, len(numbers), dtype=torch.float64, device=mask.device)
    rows = torch.stack([numerator[kept].double(), denominator[kept].double()])
    x, y = sums.index_add(1, index, rows)
    return x, y


def _check_fits(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ValueError(f"{name} have shape {tuple(values.shape)}, where the mask asks for {tuple(shape)}")
