"""Target of the distillation stage on two KL budgets: to the round's base policy and to the first policy. Ours.

The first policy is the base policy of the first of all rounds. Supports are laid out as in `tilted_policy`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import exact_kl
from .shapes import check_shape
from .tilted_policy import LOG_ZERO, UnreachableBudget, find_beta, solve_beta, sum_over_states, tilt

# Halvings of the interval of weights in which the mixture of two references that spends a budget lies: more than
# enough to tell whether another budget is within reach.
MIXTURE_BISECTIONS = 25

# Of two nested searches the inner one has this fraction of the tolerance, so that the outer one sees a function that
# falls.
INNER_TOLERANCE = 0.01


@dataclass(frozen=True)
class TwoReferenceSolution:
    """Solved prices of KL to two references.

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


def tilt_two_references(base: Tensor, first: Tensor, signal: Tensor, beta_base: float, beta_first: float) -> Tensor:
    """`pi* ~ (pi_0^b0 * pi_1^b1)^(1 / (b0 + b1)) * exp(s / (b0 + b1))` over the last dimension: `(..., K+1)` log-probs.

    With `b0 = beta_base` and `b1 = beta_first` it maximises `E_pi[s] - b0 KL(pi || pi_0) - b1 KL(pi || pi_1)` in each
    state. With one price 0, or for equal references, it is `tilt`. Slots that are `LOG_ZERO` in both references
    hold `LOG_ZERO`. Ours.

    Args:
        base: `(..., K+1)` log-probs of the base policy of the round, in nats.
        first: `(..., K+1)` log-probs of the first policy, on the same support.
        signal: `(..., K+1)`, in nats.
        beta_base: Price of a nat of KL to the base policy, at least 0; not both may be 0.
        beta_first: Price of a nat of KL to the first policy, at least 0.

    Raises:
        ValueError: for tensors of different shapes.

    Example:
        >>> base, first, signal = torch.tensor([[0.5, 0.5], [0.8, 0.2], [2.0, 1.0]]).log()
        >>> tilt_two_references(base, first, signal, beta_base=1.0, beta_first=1.0).exp()  # sqrt(8) : 1
        tensor([0.7388, 0.2612])
    """
    total = beta_base + beta_first
    return tilt(geometric_mixture(base, first, beta_base / total), signal, total)


@torch.no_grad()
def solve_two_references(
    base: Tensor,
    first: Tensor,
    signal: Tensor,
    budget: float,
    total_budget: float,
    *,
    tolerance: float = 1e-4,
    chunk: int = 65536,
) -> TwoReferenceSolution:
    """Prices whose target has most of the signal within two KL budgets on the given states. Ours.

    A price is 0 where its budget is not spent in full. If one alone suffices this is `solve_beta`. Otherwise both
    budgets bind: for each `beta_first`, `beta_base` is solved for its budget, and `beta_first` for the total. The
    dual is convex, and so is what is left of it when one price is solved, so that either KL falls in its price.

    Args:
        base: `(N, K+1)` log-probs of the base policy of the round, in nats.
        first: `(N, K+1)` log-probs of the first policy, on the same support.
        signal: `(N, K+1)`, in nats.
        budget: Most KL to the base policy, in nats per token.
        total_budget: Most KL to the first policy, in nats per token.
        tolerance: Largest accepted difference between a KL and its budget, relative to the budget.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for a budget that is not a positive number, no states, or tensors of different shapes.
        UnreachableBudget: when the signal is too weak to spend either budget, or no policy is within both.

    Example:
        >>> base, first, signal = torch.tensor([[[0.5, 0.5]], [[0.6, 0.4]], [[2.0, 1.0]]]).log()
        >>> solution = solve_two_references(base, first, signal, budget=0.1, total_budget=0.01)
        >>> solution.beta_base, round(solution.kl_first, 4)  # the total budget alone binds
        (0.0, 0.01)
    """
    check_shape(base.shape, first=first, signal=signal)
    chunks = list(zip(*(torch.split(x, chunk) for x in (base, first, signal)), strict=True))

    def mean_kls(beta_base: float, beta_first: float, signal_scale: float = 1.0) -> TwoReferenceSolution:
        sums = torch.zeros(2, dtype=torch.float64)
        for b, f, s in chunks:
            references = (b.double(), f.double())
            target = tilt_two_references(*references, signal_scale * s.double(), beta_base, beta_first)
            kls = [exact_kl(target, reference.clamp(min=LOG_ZERO)).clamp(min=0) for reference in references]
            sums += sum_over_states(torch.stack(kls)).cpu()
        return TwoReferenceSolution(beta_base, beta_first, *(sums / len(base)).tolist())

    def solve_one(reference: Tensor, kl_budget: float) -> float | None:
        try:
            return solve_beta(reference, signal, kl_budget, tolerance=tolerance, chunk=chunk).beta
        except UnreachableBudget:
            return None

    beta_base_alone, beta_first_alone = solve_one(base, budget), solve_one(first, total_budget)
    if beta_base_alone is not None:
        solution = mean_kls(beta_base_alone, 0.0)
        if solution.kl_first <= total_budget * (1 + tolerance):
            return solution
    if beta_first_alone is not None:
        solution = mean_kls(0.0, beta_first_alone)
        if solution.kl_base <= budget * (1 + tolerance):
            return solution
    if beta_base_alone is None and beta_first_alone is None:
        raise UnreachableBudget(
            f"KL budgets of {budget:g} nats per token to the base policy and of {total_budget:g} to the first one are "
            "both out of reach: this signal cannot spend either (a constant one, such as zero, spends nothing)"
        )
    min_kl_first = _min_kl_first(lambda weight: mean_kls(weight, 1 - weight, signal_scale=0.0), budget)
    if min_kl_first >= total_budget:
        raise UnreachableBudget(
            f"a KL budget of {total_budget:g} nats per token to the first policy is out of reach: whatever is within "
            f"{budget:g} of the base policy is at least {min_kl_first:.4g} from the first one"
        )

    def within_budget(beta_first: float) -> TwoReferenceSolution:
        without_base = mean_kls(0.0, beta_first)
        if without_base.kl_base <= budget:
            return without_base
        inner_tolerance = INNER_TOLERANCE * tolerance
        beta_base, _ = find_beta(lambda beta: mean_kls(beta, beta_first).kl_base, budget, inner_tolerance)
        return mean_kls(beta_base, beta_first)

    beta_first, _ = find_beta(lambda beta: within_budget(beta).kl_first, total_budget, tolerance)
    return within_budget(beta_first)


def geometric_mixture(base: Tensor, first: Tensor, base_weight: float) -> Tensor:
    """`pi_0^w * pi_1^(1 - w)` of two policies as log-probs, not normalised, for `tilt`: `(..., K+1)`, in nats.

    Args:
        base: `(..., K+1)` log-probs of the base policy of the round, in nats.
        first: `(..., K+1)` log-probs of the first policy, on the same support.
        base_weight: Weight of the base policy, between 0 and 1.

    Raises:
        ValueError: for tensors of different shapes.

    Example:
        >>> base, first = torch.tensor([[0.5, 0.5], [0.125, 0.875]]).log()
        >>> geometric_mixture(base, first, base_weight=0.5).exp()
        tensor([0.2500, 0.6614])
    """
    check_shape(base.shape, first=first)
    # Clamped, so that padding stays LOG_ZERO and a weight of 0 does not meet an infinity.
    return torch.lerp(first.clamp(min=LOG_ZERO), base.clamp(min=LOG_ZERO), base_weight)


def _min_kl_first(mixture_kls: Callable[[float], TwoReferenceSolution], budget: float) -> float:
    """Smallest KL to the first policy of all policies within a budget of the base policy, in nats per token.

    No policy beats a geometric mixture of the two in both KLs, so that it is enough to search those.

    Args:
        mixture_kls: Both KLs of the mixture with a weight of the base policy.
        budget: KL to the base policy, in nats per token.
    """
    nearest = mixture_kls(0.0)
    if nearest.kl_base <= budget:
        return nearest.kl_first
    low, high = 0.0, 1.0
    for _ in range(MIXTURE_BISECTIONS):
        weight = (low + high) / 2
        low, high = (weight, high) if mixture_kls(weight).kl_base > budget else (low, weight)
    return mixture_kls(high).kl_first
