"""A KL budget as one plain object: beta is solved for it and corrected, and weights are brought to it. Ours."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from torch import Tensor

from ..errors import InvalidArgument
from ..objectives.tilted_policy import UnreachableBudget, mean_tilted_kl, solve_beta
from ..objectives.two_references import TwoReferenceSolution, solve_two_references
from .search import MAX_EXTRAPOLATION, AlphaFit, Measurement, search_within_budget

MAX_CORRECTION = 1.5
"""The largest factor that beta is corrected for: a student that is just starting has spent next to nothing, which says
little about where it will end."""

MAX_RELATIVE_ERROR = 0.2
"""The largest relative error that the weight of a KL term is adapted by."""

SPENDING_TOLERANCE = 0.15
"""The share of a budget that may be spent too much or too little without a word; what noise explains may be too."""

CONFIDENCE = 1.645
"""Standard errors between a KL and the one-sided bound of 95 % that has to leave the tolerance before it is told."""


def spending_warning(found: Measurement, budget: float) -> str | None:
    """What to tell of a KL that is surely more, or surely less, than the budget that it was to spend; None if nothing.

    Args:
        found: The KL on fresh samples, in nats per token.
        budget: What was to be spent.
    """
    if not math.isfinite(found.kl):
        return f"the KL on fresh samples is {found.kl}: nobody knows what was spent of the budget of {budget:.4g}"
    noise = CONFIDENCE * (found.stderr if math.isfinite(found.stderr) else 0.0)
    share = f"{found.kl / budget:.0%} of {budget:.4g}"
    spent = f"{found.kl:.4g} ± {found.stderr:.2g} nats per token on fresh samples, {share}"
    if found.kl - noise > (1 + SPENDING_TOLERANCE) * budget:
        return f"outside its KL budget: {spent}"
    if found.kl + noise < (1 - SPENDING_TOLERANCE) * budget:
        return f"far from spending its KL budget: {spent}"
    return None


class BudgetController:
    """KL budget of a policy: what is to be spent, at which price, and whether it was.

    It knows neither a trainer nor a policy: log-probs and measurements come in, prices and alphas go out.

    Args:
        kl_budget: KL to the base policy to spend, in nats; None where beta is given.
        total_budget: KL to the first policy of all rounds that is not to be exceeded either, in nats; None for no such
            bound.
        beta: Price of a nat of KL, where it is given and not solved.
        min_beta: The beta below which no KL is worth its price; None for no such bound.
        margin: Standard errors between a KL and its upper confidence bound, which is what has to be inside; None where
            the budget is to be spent on average.
        tolerance: With a margin, the most of the budget that is to be left, as a share of it.

    Attributes:
        effective_budget: What is to be spent: the budget, or what `min_beta` leaves of it.
        solution: The solved prices; None before they are.
        fit: Where between the base policy and the trained one the budget was found to be spent; None before.
        measured: KL on fresh samples with the weights that training ended with, in nats per token; None if nobody
            measured it.

    Raises:
        InvalidArgument: For a value that is not a positive, finite number, or arguments that exclude one another.
    """

    def __init__(
        self,
        kl_budget: float | None,
        total_budget: float | None = None,
        beta: float | None = None,
        min_beta: float | None = None,
        margin: float | None = None,
        tolerance: float = 0.05,
    ) -> None:
        prices = {"kl_budget": kl_budget, "total_budget": total_budget, "beta": beta, "min_beta": min_beta}
        for name, value in prices.items():
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(name, f"is {value}: it must be a positive, finite number")
        if (kl_budget is None) == (beta is None):
            raise InvalidArgument(
                "kl_budget", f"is {kl_budget} and beta is {beta}: give one of them, and leave the other null"
            )
        if total_budget is not None and kl_budget is None:
            raise InvalidArgument("total_budget", "goes with kl_budget, not with a given beta")
        if min_beta is not None and (kl_budget is None or total_budget is not None):
            raise InvalidArgument("min_beta", "goes with kl_budget alone, not with beta or total_budget")
        self.kl_budget = kl_budget
        self.total_budget = total_budget
        self.beta = beta
        self.min_beta = min_beta
        self.margin = margin
        self.tolerance = tolerance
        self.effective_budget = kl_budget
        self.solution: TwoReferenceSolution | None = None
        self.fit: AlphaFit | None = None
        self.measured: Measurement | None = None
        self._log_kl_ratios: list[float] = []
        self._correction_due = False

    # Solving.

    def solve(self, logps: Mapping[str, Tensor], signal: Tensor, kl_ratio: float = 1.0) -> None:
        """Find the prices at which the target spends the budgets, each over `kl_ratio`, on some states.

        Args:
            logps: `(N, K+1)` log-probs over support and tail, in nats, of `base` and, with a total budget, of `first`.
            signal: `(N, K+1)`, in nats.
            kl_ratio: KL that a student spends for each nat that its target spends on these states.

        Raises:
            InvalidArgument: If no prices do.
        """
        assert self.kl_budget is not None
        base = logps["base"]
        self.effective_budget = self.kl_budget
        if self.min_beta is not None and (most := mean_tilted_kl(base, signal, self.min_beta)) > 0:
            self.effective_budget = min(self.kl_budget, most)
        try:
            if self.total_budget is None:
                found = solve_beta(base, signal, self.effective_budget / kl_ratio)
                self._take(TwoReferenceSolution(found.beta, 0.0, found.kl, math.nan))
            else:
                budgets = (self.effective_budget / kl_ratio, self.total_budget / kl_ratio)
                self._take(solve_two_references(base, logps["first"], signal, *budgets))
        except UnreachableBudget as error:
            raise InvalidArgument("kl_budget", f"cannot be spent: {error}") from error

    @property
    def base_weight(self) -> float:
        """The base policy's share of beta; the rest is the price of KL to the first policy."""
        if self.solution is None or self.solution.beta_first == 0:
            return 1.0
        assert self.beta is not None
        return self.solution.beta_base / self.beta

    def _take(self, solution: TwoReferenceSolution) -> None:
        self.solution = solution
        self.beta = solution.beta_base + solution.beta_first

    # Correcting.

    def observe(self, kl: float) -> None:
        """Note the KL that a student spends on fresh samples, in nats per token; the next `correct` goes by it."""
        assert self.solution is not None
        if kl > 0:
            self._log_kl_ratios.append(math.log(kl / self.solution.kl_base))
            self._correction_due = True

    @property
    def correction_due(self) -> bool:
        """Whether something was observed since the last correction."""
        return self._correction_due

    def correct(self, logps: Mapping[str, Tensor], signal: Tensor) -> None:
        """Solve again for the share of the budget that, at the ratio of KLs observed lately, spends all of it.

        The ratio is the student's KL on fresh samples over its target's on the stored states. The geometric mean of
        the last two damps the noise of a sample. Where the student cannot be made to spend more, beta stays.

        Args:
            logps: See `solve`.
            signal: See `solve`.
        """
        self._correction_due = False
        recent = self._log_kl_ratios[-2:]
        kl_ratio = min(max(math.exp(sum(recent) / len(recent)), 1 / MAX_CORRECTION), MAX_CORRECTION)
        with suppress(InvalidArgument):
            self.solve(logps, signal, kl_ratio)

    def adapted(self, coefficient: float, found: Measurement, gain: float) -> float:
        """The weight of a KL term after a measurement: `coefficient * (1 + gain * clip(KL / budget - 1, -0.2, 0.2))`.

        Source: Ziegler et al. 2019, arXiv 1909.08593.

        Args:
            coefficient: The weight so far.
            found: The measurement.
            gain: How much of the relative error is put on the weight at once.
        """
        assert self.effective_budget is not None
        error = min(max(found.kl / self.effective_budget - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return coefficient * (1 + gain * error)

    def tighter(self, to_base: Measurement, to_first: Measurement | None) -> Measurement:
        """What is spent of the tighter budget, in units of the effective one.

        Args:
            to_base: KL to the base policy, in nats per token.
            to_first: KL to the first policy, in nats per token; None without a total budget.
        """
        if self.total_budget is None or to_first is None:
            return to_base
        assert self.effective_budget is not None
        kl, stderr = (value / self.total_budget * self.effective_budget for value in (to_first.kl, to_first.stderr))
        return max(to_base, Measurement(kl, stderr), key=lambda found: found.kl)

    # Bringing weights to it.

    def upper(self, found: Measurement) -> float:
        """The upper confidence bound of a KL, infinite without a standard error; without a margin the KL itself."""
        if self.margin is None:
            return found.kl
        return found.kl + self.margin * (found.stderr if math.isfinite(found.stderr) else math.inf)

    def is_inside(self, found: Measurement) -> bool:
        """Whether the upper confidence bound of a KL is inside the budget."""
        assert self.effective_budget is not None
        return self.upper(found) <= self.effective_budget

    @property
    def search_stderr(self) -> float:
        """The standard error with which a search comes near enough to the budget, in nats."""
        assert self.effective_budget is not None
        return math.inf if self.margin is None else self.tolerance * self.effective_budget / 2 / self.margin

    def fit_alpha(
        self, measure: Callable[[float], Measurement], *, inside: float = 0.0, outside: float | None = None
    ) -> AlphaFit:
        """Where between two policies the budget is spent; see `search_within_budget`.

        Args:
            measure: KL at an alpha.
            inside: KL at alpha 0.
            outside: KL at alpha 1; None where it is to be measured.
        """
        assert self.effective_budget is not None
        self.fit = search_within_budget(
            measure,
            self.effective_budget,
            inside=inside,
            outside=outside,
            margin=self.margin,
            tolerance=self.tolerance,
            max_alpha=MAX_EXTRAPOLATION if self.margin is None else 1.0,
        )
        return self.fit

    # Going on.

    def state_dict(self) -> dict[str, Any]:
        """What was solved and observed so far."""
        return {
            "solution": None if self.solution is None else astuple(self.solution),
            "effective_budget": self.effective_budget,
            "log_kl_ratios": list(self._log_kl_ratios),
            "correction_due": self._correction_due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self.effective_budget = state["effective_budget"]
        self._log_kl_ratios = list(state["log_kl_ratios"])
        self._correction_due = state["correction_due"]
        if state["solution"] is not None:
            self._take(TwoReferenceSolution(*state["solution"]))
