"""The target of the distillation stage: the base policy tilted by a signal, on a KL budget. Ours.

With two anchors a budget to the first policy of all rounds holds beside the round's own.

A support is a last dimension of K+1 log-probs: K kept vocabulary entries, then the tail bucket,
which holds all the rest. Slots that are padding hold `LOG_ZERO` in every policy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import exact_kl

# Stands for probability 0, and keeps differences of log-probs finite where -inf would make NaN.
LOG_ZERO = -100.0

# Where beta is looked for. With signals of a few nats the lower end is as good as an argmax, and
# the upper end spends about 1e-12 nats per token.
BETA_MIN, BETA_MAX = 1e-4, 1e6

# From beta = 1, how far the search goes at a time until it has the budget between two betas.
STRIDE = math.log(8.0)

# More than the search can take: every other step halves the bracket, and float64 resolves no more.
MAX_STEPS = 140


# Halvings that find the policy between two anchors that spends a budget: more than enough to tell which is nearer.
HALVINGS = 25

# The inner of two nested searches is this much more exact, so that the outer one sees a function that falls.
INNER = 0.01


class UnreachableBudget(ValueError):
    """No beta makes the tilted policy spend this KL budget."""


@dataclass(frozen=True)
class BetaSolution:
    """A solved beta.

    Args:
        beta: The beta.
        kl: KL of the tilted policy to the base policy at that beta, in nats per token.
    """

    beta: float
    kl: float


def tilt(base: Tensor, signal: Tensor, beta: float | Tensor) -> Tensor:
    """`log pi*_beta(v) = log pi_0(v) + s(v) / beta - log Z` over the last dimension: `(..., K+1)`.

    It maximises `E_pi[s] - beta * KL(pi || pi_0)` in each state. Slots where the base policy has
    probability 0 (`LOG_ZERO` or less) hold `LOG_ZERO`, whatever their signal. Ours.

    Args:
        base: `(..., K+1)` log-probs of the base policy, in nats.
        signal: `(..., K+1)`, in nats.
        beta: Price of a nat of KL, positive.
    """
    pad = base <= LOG_ZERO
    # A finite lowest value, because in states that are all padding -inf - -inf would be NaN.
    signal = signal.masked_fill(pad, torch.finfo(signal.dtype).min)
    # A constant added to the signal changes nothing. With its maximum at 0, the entries that win
    # keep all digits of the base policy however small beta is.
    advantage = signal - signal.detach().amax(-1, keepdim=True)
    return (base + advantage / beta).log_softmax(-1).masked_fill(pad, LOG_ZERO)


def tilted_kl(base: Tensor, signal: Tensor, beta: float | Tensor) -> Tensor:
    """`KL(pi*_beta || pi_0)` of each state, at least 0 and falling in beta, in nats: `(...)`."""
    # Rounding may leave a vanishing KL slightly negative.
    return exact_kl(tilt(base, signal, beta), base.clamp(min=LOG_ZERO)).clamp(min=0)


@torch.no_grad()
def solve_beta(
    base: Tensor,
    signal: Tensor,
    budget: float,
    *,
    weights: Tensor | None = None,
    tolerance: float = 1e-4,
    chunk: int = 65536,
) -> BetaSolution:
    """The beta whose tilted policy spends `budget` nats per token on the given states. Ours.

    The weighted mean of `tilted_kl` falls monotonically in beta. It is bracketed from beta = 1 on and closed in
    on by turns of bisection and of interpolation in log beta and log KL, in float64.

    Args:
        base: `(N, K+1)` log-probs of the base policy, in nats.
        signal: `(N, K+1)`, in nats.
        budget: KL to the base policy, in nats per token.
        weights: `(N,)` weights of the states in the mean, at least 0; equal ones by default.
        tolerance: Largest accepted difference between KL and budget, relative to the budget.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for a budget that is not a positive number, or no state of positive weight.
        UnreachableBudget: when the signal is constant in every state or too weak for the budget.
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"the KL budget is {budget}; it has to be positive, in nats per token")

    def mean_kl(beta: float) -> float:
        return mean_tilted_kl(base, signal, beta, weights=weights, chunk=chunk)

    return BetaSolution(*_search(mean_kl, budget, tolerance))


@torch.no_grad()
def mean_tilted_kl(
    base: Tensor, signal: Tensor, beta: float, *, weights: Tensor | None = None, chunk: int = 65536
) -> float:
    """The weighted mean of `tilted_kl` over some states, in float64 nats per token.

    Args:
        base: `(N, K+1)` log-probs of the base policy, in nats.
        signal: `(N, K+1)`, in nats.
        beta: Price of a nat of KL, positive.
        weights: `(N,)` weights of the states in the mean, at least 0; equal ones by default.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for no state of positive weight.
    """
    weights = base.new_ones(len(base)) if weights is None else weights
    total = float(weights.double().sum())
    if not total > 0:
        raise ValueError("beta cannot be solved: there is no state with a positive weight")
    chunks = zip(*(torch.split(x, chunk) for x in (base, signal, weights)), strict=True)
    kls = [w.double() @ tilted_kl(b.double(), s.double(), beta) for b, s, w in chunks]
    return float(torch.stack(kls).sum()) / total


@dataclass(frozen=True)
class TwoAnchorSolution:
    """Solved prices of KL to two anchors.

    Args:
        beta_base: Price of a nat of KL to the base policy of the round.
        beta_first: Price of a nat of KL to the first policy.
        kl_base: KL of the target to the base policy at those, in nats per token.
        kl_first: KL of the target to the first policy, in nats per token.
    """

    beta_base: float
    beta_first: float
    kl_base: float
    kl_first: float


def tilt_two_anchors(base: Tensor, first: Tensor, signal: Tensor, beta_base: float, beta_first: float) -> Tensor:
    """`pi* ~ (pi_0^b0 * pi_1^b1)^(1 / (b0 + b1)) * exp(s / (b0 + b1))` over the last dimension: `(..., K+1)` log-probs.

    With `b0 = beta_base` and `b1 = beta_first` it maximises `E_pi[s] - b0 KL(pi || pi_0) - b1 KL(pi || pi_1)` in each
    state. With one price 0, or for anchors that are equal, it is `tilt`. Slots that are `LOG_ZERO` in both anchors
    hold `LOG_ZERO`. Ours.

    Args:
        base: `(..., K+1)` log-probs of the base policy of the round, in nats.
        first: `(..., K+1)` log-probs of the first policy, on the same support.
        signal: `(..., K+1)`, in nats.
        beta_base: Price of a nat of KL to the base policy, at least 0; not both may be 0.
        beta_first: Price of a nat of KL to the first policy, at least 0.
    """
    total = beta_base + beta_first
    return tilt(between(base, first, beta_base / total), signal, total)


@torch.no_grad()
def solve_two_anchors(
    base: Tensor,
    first: Tensor,
    signal: Tensor,
    budget: float,
    total_budget: float,
    *,
    weights: Tensor | None = None,
    tolerance: float = 1e-4,
    chunk: int = 65536,
) -> TwoAnchorSolution:
    """The prices whose target has most of the signal within two KL budgets on the given states. Ours.

    A price is 0 where its budget is not spent in full. If one alone suffices this is `solve_beta`. Otherwise both
    budgets bind: for each `beta_first`, `beta_base` is solved for its budget, and `beta_first` for the total. The
    dual is convex, and so is what is left of it when one price is solved, so that either KL falls in its price.

    Args:
        base: `(N, K+1)` log-probs of the base policy of the round, in nats.
        first: `(N, K+1)` log-probs of the first policy, on the same support.
        signal: `(N, K+1)`, in nats.
        budget: Most KL to the base policy, in nats per token.
        total_budget: Most KL to the first policy, in nats per token.
        weights: `(N,)` weights of the states in the mean, at least 0; equal ones by default.
        tolerance: Largest accepted difference between a KL and its budget, relative to the budget.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for a budget that is not a positive number, or no state of positive weight.
        UnreachableBudget: when the signal is too weak to spend either budget, or no policy is within both.
    """
    settings = {"weights": weights, "tolerance": tolerance, "chunk": chunk}
    weights = base.new_ones(len(base)) if weights is None else weights
    mass = float(weights.double().sum())
    states = (base, first, signal, weights)
    chunks = list(zip(*(torch.split(x, chunk) for x in states), strict=True))

    def mean_kls(beta_base: float, beta_first: float, strength: float = 1.0) -> TwoAnchorSolution:
        sums = torch.zeros(2, dtype=torch.float64)
        for b, f, s, w in chunks:
            anchors = (b.double(), f.double())
            target = tilt_two_anchors(*anchors, strength * s.double(), beta_base, beta_first)
            kls = [exact_kl(target, anchor.clamp(min=LOG_ZERO)).clamp(min=0) for anchor in anchors]
            sums += (torch.stack(kls) @ w.double()).cpu()
        return TwoAnchorSolution(beta_base, beta_first, *(sums / mass).tolist())

    def alone(anchor: Tensor, most: float) -> float | None:
        try:
            return solve_beta(anchor, signal, most, **settings).beta  # type: ignore[arg-type]
        except UnreachableBudget:
            return None

    by_base, by_first = alone(base, budget), alone(first, total_budget)
    if by_base is not None:
        solution = mean_kls(by_base, 0.0)
        if solution.kl_first <= total_budget * (1 + tolerance):
            return solution
    if by_first is not None:
        solution = mean_kls(0.0, by_first)
        if solution.kl_base <= budget * (1 + tolerance):
            return solution
    if by_base is None and by_first is None:
        raise UnreachableBudget(
            f"KL budgets of {budget:g} nats per token to the base policy and of {total_budget:g} to the first one are "
            "both out of reach: this signal cannot spend either (a constant one, such as zero, spends nothing)"
        )
    least = _least_to_first(lambda share: mean_kls(share, 1 - share, strength=0.0), budget)
    if least >= total_budget:
        raise UnreachableBudget(
            f"a KL budget of {total_budget:g} nats per token to the first policy is out of reach: whatever is within "
            f"{budget:g} of the base policy is at least {least:.4g} from the first one"
        )

    def base_solved(beta_first: float) -> TwoAnchorSolution:
        free = mean_kls(0.0, beta_first)
        if free.kl_base <= budget:
            return free
        beta_base, _ = _search(lambda beta: mean_kls(beta, beta_first).kl_base, budget, INNER * tolerance)
        return mean_kls(beta_base, beta_first)

    beta_first, _ = _search(lambda beta: base_solved(beta).kl_first, total_budget, tolerance)
    return base_solved(beta_first)


def between(base: Tensor, first: Tensor, share: float) -> Tensor:
    """The geometric mean of two policies, not normalised, as an anchor for `tilt`: `(..., K+1)`, in nats.

    Args:
        base: `(..., K+1)` log-probs of the base policy of the round, in nats.
        first: `(..., K+1)` log-probs of the first policy, on the same support.
        share: Weight of the base policy, between 0 and 1.
    """
    # Clamped, so that padding stays LOG_ZERO and a share of 0 does not meet an infinity.
    return torch.lerp(first.clamp(min=LOG_ZERO), base.clamp(min=LOG_ZERO), share)


def _least_to_first(kls: Callable[[float], TwoAnchorSolution], budget: float) -> float:
    """The least KL to the first policy of what is within a budget of the base policy, in nats per token.

    The geometric means of two policies are those that no other beats in both KLs.
    """
    nearest = kls(0.0)
    if nearest.kl_base <= budget:
        return nearest.kl_first
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        low, high = (share, high) if kls(share).kl_base > budget else (low, share)
    return kls(high).kl_first


def _search(kl_at: Callable[[float], float], budget: float, tolerance: float) -> tuple[float, float]:
    """The beta at which a KL that falls in it is the budget, and the KL there.

    Raises:
        UnreachableBudget: at the end of the range.
    """
    low = high = None  # (log beta, KL) on either side: the KL at low is above the budget
    log_beta = 0.0
    for step in range(MAX_STEPS):
        kl = kl_at(math.exp(log_beta))
        if abs(kl - budget) <= tolerance * budget:
            break
        low, high = ((log_beta, kl), high) if kl > budget else (low, (log_beta, kl))
        if low is None or high is None:
            log_beta = _further(log_beta, -1 if low is None else 1, kl, budget)
        elif step % 2 or not 0 < high[1] < low[1]:
            log_beta = (low[0] + high[0]) / 2
        else:
            share = math.log(low[1] / budget) / math.log(low[1] / high[1])
            log_beta = low[0] + share * (high[0] - low[0])
    return math.exp(log_beta), kl


def _further(log_beta: float, direction: int, kl: float, budget: float) -> float:
    """The next log beta to try while the budget lies beyond all that were tried.

    Raises:
        UnreachableBudget: at the end of the range.
    """
    end = math.log(BETA_MAX if direction > 0 else BETA_MIN)
    if log_beta == end:
        raise UnreachableBudget(
            f"a KL budget of {budget:g} nats per token is out of reach: this signal can spend at "
            f"{'least' if direction > 0 else 'most'} {kl:.4g} (a constant signal, such as zero, spends nothing)"
        )
    return min(log_beta + STRIDE, end) if direction > 0 else max(log_beta - STRIDE, end)
