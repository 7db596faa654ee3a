"""The signal: what a set of policies has to say about each vocabulary entry, in nats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One clipped log-ratio of two policies.

    Args:
        numerator: Name of the policy whose opinion is followed.
        denominator: Name of the policy it is compared with.
        weight: Factor of the clipped log-ratio in the signal.
        clip: Bound on the absolute log-ratio, in nats, which tames a degenerate teacher.
    """

    numerator: str = "teacher"
    denominator: str = "unlearned"
    weight: float = 1.0
    clip: float = 3.0


class Signal:
    """`s(v) = sum_k w_k * clip(log pi_num_k(v) - log pi_den_k(v), -c_k, c_k)`, in nats. Ours.

    Args:
        terms: The clipped log-ratios that are added up; by default one `Term()`, teacher/unlearned.

    Raises:
        ValueError: for no terms, a term of a policy with itself, a weight that is not finite,
            weights that are all zero, or a clip that is not a positive number.
    """

    # None, because jsonargparse cannot print a default that is a sequence of dataclass instances.
    def __init__(self, terms: Sequence[Term] | None = None) -> None:
        self.terms = (Term(),) if terms is None else tuple(terms)
        if not any(term.weight for term in self.terms):
            raise ValueError("a signal needs at least one term whose weight is not zero")
        for term in self.terms:
            _check(term)

    @property
    def policies(self) -> list[str]:
        """Names of the policies the terms use, sorted, each once."""
        return sorted({name for t in self.terms for name in (t.numerator, t.denominator)})

    def __call__(self, logps: Mapping[str, Tensor]) -> Tensor:
        """The signal on a support: log-probs `(..., K+1)` by policy name to `(..., K+1)`, in nats.

        Raises:
            ValueError: when a policy that a term names is missing.
        """
        missing = [name for name in self.policies if name not in logps]
        if missing:
            raise ValueError(
                f"the signal needs log-probs of {', '.join(missing)}; "
                f"there are those of {', '.join(sorted(logps)) or 'no policy'}"
            )
        ratios = [
            term.weight
            * (logps[term.numerator] - logps[term.denominator]).clamp(-term.clip, term.clip)
            for term in self.terms
        ]
        return torch.stack(ratios).sum(0)


def _check(term: Term) -> None:
    if term.numerator == term.denominator:
        raise ValueError(f"numerator and denominator of a term are both {term.numerator!r}")
    if not math.isfinite(term.weight):
        raise ValueError(f"the weight of a term is {term.weight}; it has to be finite")
    if not 0 < term.clip < math.inf:
        raise ValueError(f"the clip of a term is {term.clip}; it has to be a positive number")
