"""Slow float64 references: the formulas as one would write them on paper, one loop per symbol.

Nothing here comes from the package, and nothing is vectorised over a thing that the formula
indexes: a mistake in broadcasting, masking or chunking cannot be made twice. Arguments are
whatever `numpy.asarray` takes; log-probs are natural logarithms, `-inf` is probability zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def array(values: Any) -> Array:
    """Float64 NumPy copy of a tensor, list or array."""
    if hasattr(values, "detach"):
        values = values.detach().double().numpy()
    return np.array(values, dtype=np.float64)


def grad(tensor: Any) -> Any:
    """What `backward` left in a tensor; a failure where it left nothing."""
    assert tensor.grad is not None
    return tensor.grad


def over_rows(function: Callable[..., float], *tensors: Any) -> Array:
    """Apply a function of vectors to each row: the last dimension disappears."""
    arrays = [array(tensor) for tensor in tensors]
    result = np.zeros(arrays[0].shape[:-1])
    for index in np.ndindex(*result.shape):
        result[index] = function(*[one[index] for one in arrays])
    return result


# --- reduction ------------------------------------------------------------------------------


def masked_sum(values: Any, mask: Any) -> float:
    total = 0.0
    for value, counts in zip(array(values).flat, np.asarray(mask).flat, strict=True):
        if counts:
            total += value
    return total


# --- advantages -----------------------------------------------------------------------------


def group_advantages(rewards: Any, groups: Any) -> Array:
    """`(R - mean) / (std + 1e-4)` with Bessel's correction; 0 in a group of equal rewards."""
    rewards, groups = array(rewards), [int(group) for group in groups]
    result = np.zeros(len(rewards))
    for i, group in enumerate(groups):
        members = [rewards[j] for j in range(len(rewards)) if groups[j] == group]
        if all(member == members[0] for member in members):
            continue
        mean = sum(members) / len(members)
        variance = sum((member - mean) ** 2 for member in members) / (len(members) - 1)
        result[i] = (rewards[i] - mean) / (math.sqrt(variance) + 1e-4)
    return result


# --- distributions --------------------------------------------------------------------------


def log_softmax(logits: Any) -> Array:
    """Over the last dimension."""
    logits = array(logits)
    result = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape[:-1]):
        top = max(logits[index])
        log_total = top + math.log(sum(math.exp(logit - top) for logit in logits[index]))
        for v, logit in enumerate(logits[index]):
            result[(*index, v)] = logit - log_total
    return result


def kl(logp: Any, logq: Any) -> Array:
    """`KL(p||q)` of each row, in nats."""

    def one(log_p: Array, log_q: Array) -> float:
        total = 0.0
        for a, b in zip(log_p, log_q, strict=True):
            if math.exp(a) > 0.0:
                total += math.exp(a) * (a - b)
        return total

    return over_rows(one, logp, logq)


def entropy(logp: Any) -> Array:
    """Entropy of each row, in nats."""

    def one(log_p: Array) -> float:
        return -sum(math.exp(a) * a for a in log_p if math.exp(a) > 0.0)

    return over_rows(one, logp)


def kl_logit_gradient(logits: Any, logq: Any) -> Array:
    """Gradient of `sum KL(softmax(logits)||q)` with respect to the logits: `p (log p/q - KL)`."""
    logp, logq = log_softmax(logits), array(logq)
    divergence = kl(logp, logq)
    result = np.zeros_like(logp)
    for index in np.ndindex(*logp.shape):
        p = math.exp(logp[index])
        result[index] = p * (logp[index] - logq[index] - divergence[index[:-1]])
    return result


# --- stage 1 --------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def sapo_loss(logps: Any, old: Any, advantages: Any, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Array:
    logps, old, advantages = array(logps), array(old), array(advantages)
    result = np.zeros_like(logps)
    for b, t in np.ndindex(*logps.shape):
        tau = tau_positive if advantages[b] > 0 else tau_negative
        ratio = math.exp(logps[b, t] - old[b, t])
        result[b, t] = -(4.0 / tau) * sigmoid(tau * (ratio - 1.0)) * advantages[b]
    return result


def sapo_gradient(
    logps: Any, old: Any, advantages: Any, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Array:
    """`d loss / d logp = -4 g (1 - g) r A`, `g` the gate (the `1/tau` cancels)."""
    logps, old, advantages = array(logps), array(old), array(advantages)
    result = np.zeros_like(logps)
    for b, t in np.ndindex(*logps.shape):
        tau = tau_positive if advantages[b] > 0 else tau_negative
        ratio = math.exp(logps[b, t] - old[b, t])
        gate, closed = sigmoid(tau * (ratio - 1.0)), sigmoid(-tau * (ratio - 1.0))
        result[b, t] = -4.0 * gate * closed * ratio * advantages[b]
    return result


def clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def ppo_loss(logps: Any, old: Any, advantages: Any, low: float, high: float, dual: float | None = None) -> Array:
    logps, old, advantages = array(logps), array(old), array(advantages)
    result = np.zeros_like(logps)
    for b, t in np.ndindex(*logps.shape):
        ratio, advantage = math.exp(logps[b, t] - old[b, t]), advantages[b]
        gain = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
        if dual is not None and advantage < 0:
            gain = max(gain, dual * advantage)
        result[b, t] = -gain
    return result


def ppo_gradient(logps: Any, old: Any, advantages: Any, low: float, high: float, dual: float | None = None) -> Array:
    """`d loss / d logp`: `-r A` where the ratio may still move the loss, else 0."""
    logps, old, advantages = array(logps), array(old), array(advantages)
    result = np.zeros_like(logps)
    for b, t in np.ndindex(*logps.shape):
        ratio, advantage = math.exp(logps[b, t] - old[b, t]), advantages[b]
        moves = ratio < 1 + high if advantage > 0 else 1 - low < ratio < (math.inf if dual is None else dual)
        if moves:
            result[b, t] = -ratio * advantage
    return result


def clipped_policy_gradient_loss(
    logps: Any,
    old: Any,
    sampler: Any,
    signal: Any,
    divergence: Any,
    beta: float,
    low: float,
    high: float,
    truncate: float,
) -> tuple[Array, Array]:
    """The per-token losses, and their gradient with respect to the log-probs (the divergence's apart)."""
    logps, old, sampler, signal = array(logps), array(old), array(sampler), array(signal)
    divergence = array(divergence)
    losses, gradient = np.zeros_like(logps), np.zeros_like(logps)
    for b, t in np.ndindex(*logps.shape):
        s, ratio = float(signal[b, t]), math.exp(logps[b, t] - old[b, t])
        weight = min(truncate, math.exp(old[b, t] - sampler[b, t]))
        gain = min(ratio * s, clip(ratio, 1 - low, 1 + high) * s)
        losses[b, t] = beta * divergence[b, t] - weight * gain
        if ratio < 1 + high if s > 0 else ratio > 1 - low:
            gradient[b, t] = -weight * ratio * s
    return losses, gradient


def gspo_loss(logps: Any, old: Any, mask: Any, advantages: Any, low: float, high: float) -> Array:
    logps, old, mask, advantages = array(logps), array(old), np.asarray(mask), array(advantages)
    result = np.zeros(len(logps))
    for b in range(len(logps)):
        ratios = [logps[b, t] - old[b, t] for t in range(logps.shape[1]) if mask[b, t]]
        ratio = math.exp(sum(ratios) / len(ratios))
        result[b] = -min(ratio * advantages[b], clip(ratio, 1 - low, 1 + high) * advantages[b])
    return result


def gspo_gradient(logps: Any, old: Any, mask: Any, advantages: Any, low: float, high: float) -> Array:
    """`d loss / d logp_t = -s A / T` where the response is not clipped."""
    logps, old, mask, advantages = array(logps), array(old), np.asarray(mask), array(advantages)
    result = np.zeros_like(logps)
    for b in range(len(logps)):
        tokens = [t for t in range(logps.shape[1]) if mask[b, t]]
        ratio = math.exp(sum(logps[b, t] - old[b, t] for t in tokens) / len(tokens))
        if ratio < 1 + high if advantages[b] > 0 else ratio > 1 - low:
            for t in tokens:
                result[b, t] = -ratio * advantages[b] / len(tokens)
    return result


def squared_errors(log_ratio: Any, mask: Any, advantages: Any, level: str, beta: float) -> Array:
    """Per token `(B, T)`, or per response `(B,)`."""
    log_ratio, mask, advantages = array(log_ratio), np.asarray(mask), array(advantages)
    if level == "token":
        result = np.zeros_like(log_ratio)
        for b, t in np.ndindex(*log_ratio.shape):
            result[b, t] = (beta * log_ratio[b, t] - advantages[b]) ** 2
        return result
    result = np.zeros(len(log_ratio))
    for b in range(len(log_ratio)):
        total = sum(log_ratio[b, t] for t in range(log_ratio.shape[1]) if mask[b, t])
        result[b] = (beta * total - advantages[b]) ** 2
    return result


# --- signal, tilt, budget -------------------------------------------------------------------


def signal(logps: Mapping[str, Any], terms: Sequence[tuple[str, str, float, float]]) -> Array:
    """`sum_k w clip(log num - log den, -c, c)`; terms are (numerator, denominator, w, c)."""
    arrays = {name: array(values) for name, values in logps.items()}
    result = np.zeros_like(next(iter(arrays.values())))
    for index in np.ndindex(*result.shape):
        for numerator, denominator, weight, clip in terms:
            ratio = float(arrays[numerator][index] - arrays[denominator][index])
            result[index] += weight * min(max(ratio, -clip), clip)
    return result


def tilt(base: Any, signal: Any, beta: float, log_zero: float = -100.0) -> Array:
    """`log(p e^{s/beta} / Z)` of each row; slots at or below `log_zero` are left out of it."""
    base, signal = array(base), array(signal)
    result = np.full_like(base, log_zero)
    for index in np.ndindex(*base.shape[:-1]):
        kept = [k for k in range(base.shape[-1]) if base[(*index, k)] > log_zero]
        if kept:
            exponents = [base[(*index, k)] + signal[(*index, k)] / beta for k in kept]
            for k, value in zip(kept, log_softmax(exponents), strict=True):
                result[(*index, k)] = value
    return result


def two_references(base: Any, first: Any, signal: Any, beta_base: float, beta_first: float) -> Array:
    """`log((p^b q^c)^(1/(b+c)) e^{s/(b+c)} / Z)` of each row."""
    base, first, signal = array(base), array(first), array(signal)
    total, result = beta_base + beta_first, np.zeros_like(base)
    for index in np.ndindex(*base.shape[:-1]):
        exponents = [
            (beta_base * base[(*index, k)] + beta_first * first[(*index, k)] + signal[(*index, k)]) / total
            for k in range(base.shape[-1])
        ]
        result[index] = log_softmax(exponents)
    return result


def tilted_kl(base: Any, signal: Any, beta: float) -> Array:
    return kl(tilt(base, signal, beta), base)


def mean_tilted_kl(base: Any, signal: Any, beta: float) -> float:
    divergences = tilted_kl(base, signal, beta)
    return float(sum(divergences)) / len(divergences)


def tilt_objective(policy: Any, base: Any, signal: Any, beta: float) -> float:
    """`E_pi[s] - beta KL(pi||base)` of one state, from probabilities."""
    total = 0.0
    for p, q, s in zip(policy, base, signal, strict=True):
        if p > 0:
            total += p * s - beta * p * math.log(p / q)
    return total


# --- output head ----------------------------------------------------------------------------


def head_logits(
    hidden: Any,
    weight: Any,
    bias: Any = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    hidden, weight = array(hidden), array(weight)
    result = np.zeros((len(hidden), len(weight)))
    for n, v in np.ndindex(*result.shape):
        logit = sum(h * w for h, w in zip(hidden[n], weight[v], strict=True))
        if bias is not None:
            logit += array(bias)[v]
        logit *= scale
        result[n, v] = logit if softcap is None else softcap * math.tanh(logit / softcap)
    return result


def smallest_support(logp: Any, mass: float, max_size: int) -> list[int]:
    """Vocabulary entries of one position, most probable first, until `mass` is covered."""
    logp = array(logp)
    chosen: list[int] = []
    covered = 0.0
    for v in sorted(range(len(logp)), key=lambda v: -logp[v]):
        if chosen and (covered >= mass or len(chosen) == max_size):
            break
        chosen.append(v)
        covered += math.exp(logp[v])
    return chosen


def support_logps(logits: Any, ids: Any, log_zero: float = -100.0) -> Array:
    """Log-probs at `ids` (-1: padding), then the log of the mass of everything else."""
    logp, ids = log_softmax(logits), np.asarray(ids)
    result = np.full((ids.shape[0], ids.shape[1] + 1), log_zero)
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[n, k] >= 0:
                result[n, k] = logp[n, ids[n, k]]
        tail = sum(math.exp(logp[n, v]) for v in range(logp.shape[1]) if v not in ids[n])
        if tail > math.exp(log_zero):
            result[n, -1] = math.log(tail)
    return result


# --- metrics --------------------------------------------------------------------------------


def share_of_subsets_with_a_correct_one(correct: int, samples: int, k: int) -> float:
    """pass@k by enumeration."""
    subsets = list(combinations([i < correct for i in range(samples)], k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def ratio_by_prompts(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """`sum x / sum y`, and the standard error of the mean linearised residual in units of the mean denominator."""
    if sum(y) == 0:
        return [math.nan, math.nan]
    ratio = sum(x) / sum(y)
    if len(x) == 1:
        return [ratio, math.nan]
    residuals = np.array([a - ratio * b for a, b in zip(x, y, strict=True)])
    return [ratio, float(np.std(residuals, ddof=1) / np.sqrt(len(x)) / abs(np.mean(y)))]


def effective_share(log_ratios: Any) -> float:
    """`(sum w)^2 / (n sum w^2)` of weights in units of the largest."""
    log_ratios = array(log_ratios)
    weights = [math.exp(log_ratio - max(log_ratios)) for log_ratio in log_ratios]
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(weight**2 for weight in weights))
