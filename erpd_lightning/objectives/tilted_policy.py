"""Target of the distillation stage: the base policy tilted by a signal, on a KL budget. Ours.

A support is a last dimension of K+1 log-probs: K kept vocabulary entries, then the tail bucket,
which holds all the rest. Slots that are padding hold `LOG_ZERO` in every policy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import exact_kl
from .shapes import check_shape

# Stands for probability 0, and keeps differences of log-probs finite where -inf would make NaN.
LOG_ZERO = -100.0

# Where beta is looked for. With signals of a few nats the lower end is as good as an argmax, and
# the upper end spends about 1e-12 nats per token.
BETA_MIN, BETA_MAX = 1e-4, 1e6

# How far the search for beta goes at a time, from beta = 1 on, until it has the budget between two betas.
LOG_BETA_STEP = math.log(8.0)

# More than the search can take: every other step halves the bracket, and float64 resolves no more.
MAX_STEPS = 140


class UnreachableBudget(ValueError):
    """No beta makes the tilted policy spend this KL budget."""


@dataclass(frozen=True)
class BetaSolution:
    """Solved beta, and the KL that its tilted policy spends.

    Args:
        beta: Price of a nat of KL to the base policy.
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

    Raises:
        ValueError: for a signal of another shape than the base policy's.

    Example:
        >>> base, signal = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.0, math.log(2), 0.0])
        >>> tilt(base, signal, beta=1.0).exp()
        tensor([0.4000, 0.4000, 0.2000])
    """
    check_shape(base.shape, signal=signal)
    pad = base <= LOG_ZERO
    # A finite lowest value, because in states that are all padding -inf - -inf would be NaN.
    signal = signal.masked_fill(pad, torch.finfo(signal.dtype).min)
    # A constant added to the signal changes nothing. With its maximum at 0, the entries that win
    # keep all digits of the base policy however small beta is.
    advantage = signal - signal.detach().amax(-1, keepdim=True)
    return (base + advantage / beta).log_softmax(-1).masked_fill(pad, LOG_ZERO)


def tilted_kl(base: Tensor, signal: Tensor, beta: float | Tensor) -> Tensor:
    """`KL(pi*_beta || pi_0)` of each state, at least 0 and falling in beta, in nats: `(...)`.

    Example:
        >>> base, signal = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.0, math.log(2), 0.0])
        >>> tilted_kl(base, signal, beta=1.0)
        tensor(0.0541)
    """
    # Rounding may leave a vanishing KL slightly negative.
    return exact_kl(tilt(base, signal, beta), base.clamp(min=LOG_ZERO)).clamp(min=0)


@torch.no_grad()
def solve_beta(
    base: Tensor,
    signal: Tensor,
    budget: float,
    *,
    tolerance: float = 1e-4,
    chunk: int = 65536,
) -> BetaSolution:
    """Beta whose tilted policy spends `budget` nats per token on the given states. Ours.

    The mean of `tilted_kl` falls monotonically in beta. It is bracketed from beta = 1 on and closed in
    on by turns of bisection and of interpolation in log beta and log KL, in float64.

    Args:
        base: `(N, K+1)` log-probs of the base policy, in nats.
        signal: `(N, K+1)`, in nats.
        budget: KL to the base policy, in nats per token.
        tolerance: Largest accepted difference between KL and budget, relative to the budget.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for a budget that is not a positive number, no states, or tensors of different shapes.
        UnreachableBudget: when the signal is constant in every state or too weak for the budget.

    Example:
        >>> base, signal = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]])
        >>> round(solve_beta(base, signal, budget=0.05).beta, 3)
        1.541
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"the KL budget is {budget}; it has to be positive, in nats per token")

    def mean_kl(beta: float) -> float:
        return mean_tilted_kl(base, signal, beta, chunk=chunk)

    return BetaSolution(*find_beta(mean_kl, budget, tolerance))


@torch.no_grad()
def mean_tilted_kl(base: Tensor, signal: Tensor, beta: float, *, chunk: int = 65536) -> float:
    """Mean of `tilted_kl` over some states, in float64 nats per token.

    Args:
        base: `(N, K+1)` log-probs of the base policy, in nats.
        signal: `(N, K+1)`, in nats.
        beta: Price of a nat of KL, positive.
        chunk: States that are handled at a time, a bound on memory.

    Raises:
        ValueError: for no states, or tensors of different shapes.

    Example:
        >>> base, signal = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> round(mean_tilted_kl(base, signal, beta=1.0), 4)
        0.0555
    """
    check_shape((None, None), base=base)
    check_shape(base.shape, signal=signal)
    if len(base) == 0:
        raise ValueError("base has no states: beta cannot be solved without any")
    chunks = zip(*(torch.split(x, chunk) for x in (base, signal)), strict=True)
    sums = [sum_over_states(tilted_kl(b.double(), s.double(), beta)) for b, s in chunks]
    return float(torch.stack(sums).sum()) / len(base)


def sum_over_states(kls: Tensor) -> Tensor:
    """Sum over the states, `(..., N)` to `(...)`.

    As a product with ones, which rounds otherwise than `Tensor.sum`: the betas of earlier runs hold to the last bit.

    Example:
        >>> sum_over_states(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([3., 7.])
    """
    return kls @ kls.new_ones(kls.shape[-1])


def find_beta(kl_at: Callable[[float], float], budget: float, tolerance: float) -> tuple[float, float]:
    """Beta at which a KL that falls in it is the budget, and the KL there.

    Args:
        kl_at: KL at a beta, in nats per token.
        budget: KL to find, in nats per token.
        tolerance: Largest accepted difference between KL and budget, relative to the budget.

    Raises:
        UnreachableBudget: at the end of the range.

    Example:
        >>> beta, kl = find_beta(lambda beta: 1 / beta, budget=0.5, tolerance=1e-6)
        >>> round(beta, 4), round(kl, 4)
        (2.0, 0.5)
    """
    low = high = None  # (log beta, KL) on either side: the KL at low is above the budget
    log_beta = 0.0
    for step in range(MAX_STEPS):
        kl = kl_at(math.exp(log_beta))
        if abs(kl - budget) <= tolerance * budget:
            break
        low, high = ((log_beta, kl), high) if kl > budget else (low, (log_beta, kl))
        if low is None or high is None:
            log_beta = _next_log_beta(log_beta, -1 if low is None else 1, kl, budget)
        elif step % 2 or not 0 < high[1] < low[1]:
            log_beta = (low[0] + high[0]) / 2
        else:
            fraction = math.log(low[1] / budget) / math.log(low[1] / high[1])
            log_beta = low[0] + fraction * (high[0] - low[0])
    return math.exp(log_beta), kl


def _next_log_beta(log_beta: float, direction: int, kl: float, budget: float) -> float:
    """Next log beta to try while the budget lies beyond all that were tried.

    Raises:
        UnreachableBudget: at the end of the range.
    """
    end = math.log(BETA_MAX if direction > 0 else BETA_MIN)
    if log_beta == end:
        raise UnreachableBudget(
            f"a KL budget of {budget:g} nats per token is out of reach: this signal can spend at "
            f"{'least' if direction > 0 else 'most'} {kl:.4g} (a constant signal, such as zero, spends nothing)"
        )
    return min(log_beta + LOG_BETA_STEP, end) if direction > 0 else max(log_beta - LOG_BETA_STEP, end)
