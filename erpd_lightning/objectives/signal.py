"""Signal of the distillation stage: log-ratios of policies for each vocabulary entry, in nats. Ours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import check_shape

MAX_CLIP = 1e3
"""Nats: no two policies in float32 differ by more, so that this clip leaves every log-ratio as it is."""


@dataclass(frozen=True)
class Term:
    """Clipped log-ratio of two policies, a term of a `Signal`.

    Args:
        numerator: Name of the policy whose opinion is followed.
        denominator: Name of the policy it is compared with.
        weight: Factor of the clipped log-ratio in the signal.
        clip: Bound on the absolute log-ratio, in nats, which tames a degenerate teacher.

    Example:
        >>> Term("teacher", "base", clip=1.0)
        Term(numerator='teacher', denominator='base', weight=1.0, clip=1.0)
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

    Example:
        >>> teacher, base = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> Signal([Term("teacher", "base", clip=0.5)])({"teacher": teacher, "base": base})
        tensor([ 0.5000, -0.4055])
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
            ValueError: when a policy that a term names is missing, or its log-probs have another shape.
        """
        missing = [name for name in self.policies if name not in logps]
        if missing:
            raise ValueError(
                f"the signal needs log-probs of {', '.join(missing)}; "
                f"there are those of {', '.join(sorted(logps)) or 'no policy'}"
            )
        shape = logps[self.terms[0].numerator].shape
        check_shape(shape, **{name: logps[name] for name in self.policies})
        ratios = [
            term.weight * (logps[term.numerator] - logps[term.denominator]).clamp(-term.clip, term.clip)
            for term in self.terms
        ]
        return torch.stack(ratios).sum(0)


class AutoSignal(Signal):
    """Signal, and the share of the KL budget to spend on it, that are chosen by preview. Ours.

    The candidates are each teacher over each denominator at each clip and each share of the budget, and then
    policies themselves (over the base policy at beta = 1, unclipped), as far as the budget allows. Decoding from
    the candidates for some training prompts, held out for it, tells which to take: the first that is not worse than
    the best by more than a standard error. Their verified samples count as rollouts.

    Args:
        teachers: Names of the policies whose opinion may be followed; by default `teacher` alone.
        denominators: Names of those that they are compared with; by default `unlearned` and `base`.
        clips: Bounds on the absolute log-ratio, in nats; by default 3 alone.
        shares: Shares of the budget, in (0, 1]; by default all of it and half of it.
        themselves: Names of the policies that are candidates themselves; by default the teachers.
        prompts: Prompts of each round that are held out of its rollouts.
        samples: Responses to each of them for each candidate.

    Raises:
        ValueError: for no candidates, or a value out of range.

    Example:
        >>> [name for name, _, _ in AutoSignal(denominators=["unlearned"], shares=[1.0]).candidates()]
        ['teacher/unlearned, clip 3, 100% of the budget', 'teacher']
    """

    def __init__(
        self,
        teachers: Sequence[str] | None = None,
        denominators: Sequence[str] | None = None,
        clips: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        themselves: Sequence[str] | None = None,
        prompts: int = 48,
        samples: int = 4,
    ) -> None:
        self.teachers = ["teacher"] if teachers is None else list(teachers)
        self.denominators = ["unlearned", "base"] if denominators is None else list(denominators)
        self.clips = [3.0] if clips is None else list(clips)
        self.shares = [1.0, 0.5] if shares is None else list(shares)
        self.themselves = self.teachers if themselves is None else list(themselves)
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares is {self.shares}; each has to be above 0 and at most 1")
        if min(prompts, samples) < 1:
            raise ValueError(f"prompts ({prompts}) and samples ({samples}) have to be at least 1")
        self.prompts = prompts
        self.samples = samples
        super().__init__([signal.terms[0] for _, signal, _ in self.candidates()])

    def candidates(self) -> list[tuple[str, Signal, float | None]]:
        """Name, signal, and share of the budget of each; no share for a teacher itself, whose beta is 1."""
        found: list[tuple[str, Signal, float | None]] = [
            (
                f"{teacher}/{denominator}, clip {clip:g}, {share:.0%} of the budget",
                Signal([Term(teacher, denominator, clip=clip)]),
                share,
            )
            for teacher in self.teachers
            for denominator in self.denominators
            for clip in self.clips
            for share in self.shares
        ]
        return found + [(name, Signal([Term(name, "base", clip=MAX_CLIP)]), None) for name in self.themselves]

    def __call__(self, logps: Mapping[str, Tensor]) -> Tensor:
        """Refused: it has no values before one of its candidates is chosen.

        Raises:
            ValueError: always.
        """
        raise ValueError("an AutoSignal has no values: take the Signal of the candidate that was chosen")


def _check(term: Term) -> None:
    if term.numerator == term.denominator:
        raise ValueError(f"numerator and denominator of a term are both {term.numerator!r}")
    if not math.isfinite(term.weight):
        raise ValueError(f"the weight of a term is {term.weight}; it has to be finite")
    if not 0 < term.clip < math.inf:
        raise ValueError(f"the clip of a term is {term.clip}; it has to be a positive number")
