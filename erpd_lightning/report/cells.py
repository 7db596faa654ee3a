"""Text of measurements in the report's tables and alternative texts: estimates with standard errors, percentages."""

import math

from .measures import Estimate, rollouts_per_point
from .read import Measured

NO_VALUE = "—"


def kl_estimate(row: Measured | None, name: str = "kl_per_token") -> Estimate | None:
    """KL of a policy in nats per token, not below 0; None without an evaluation."""
    return None if row is None else Estimate(max(row[name], 0.0), row[f"{name}_stderr"])


def estimate_text(estimate: Estimate | None, digits: int) -> str:
    """Value ± standard error, with so many digits after the point."""
    if estimate is None:
        return NO_VALUE
    stderr = f" ± {estimate.stderr:.{digits}f}" if math.isfinite(estimate.stderr) else ""
    return f"{estimate.value:.{digits}f}{stderr}"


def percent_text(estimate: Estimate | None) -> str:
    """Share as a percentage ± standard error."""
    if estimate is None or not math.isfinite(estimate.value):
        return NO_VALUE
    stderr = f" ± {100 * estimate.stderr:.1f}" if math.isfinite(estimate.stderr) else ""
    return f"{100 * estimate.value:.1f}{stderr} %"


def budget_share_text(spent: Estimate | None, budget: float | None) -> str:
    """KL spent as a percentage of the budget."""
    if spent is None or not budget:
        return NO_VALUE
    return percent_text(Estimate(spent.value / budget, spent.stderr / budget))


def number_text(number: float | None) -> str:
    """Number with four significant digits."""
    return NO_VALUE if number is None else f"{number:.4g}"


def seed_text(seed: int | None) -> str:
    """Seed of a run."""
    return NO_VALUE if seed is None else str(seed)


def policy_cells(row: Measured) -> tuple[str, ...]:
    """Cells pass@1, pass@k, KL, KL to the first policy, entropy and length of a policy."""
    return (
        estimate_text(Estimate(row["pass@1"], row["pass@1_stderr"]), 3),
        f"{row['pass@k']:.3f}",
        estimate_text(kl_estimate(row), 4),
        estimate_text(kl_estimate(row, "kl_per_token_to_first"), 4),
        f"{row['entropy_per_token']:.3f}",
        f"{row['mean_length']:.1f}",
    )


def price_cells(rollouts: int, gained: Estimate | None) -> tuple[str, str]:
    """Cells points gained and rollouts per point."""
    if gained is None:
        return NO_VALUE, NO_VALUE
    price = rollouts_per_point(rollouts, gained)
    return estimate_text(gained, 1), "no clear gain" if price is None else estimate_text(price, 0)


def policy_text(row: Measured, kl: str = "kl_per_token") -> str:
    """Accuracy and KL of a policy in words."""
    return f"pass@1 {row['pass@1']:.3f} at {max(row[kl], 0.0):.4f} nats"
