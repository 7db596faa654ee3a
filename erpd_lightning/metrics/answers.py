"""How well prompts are answered, and in how many ways: pass@k, the majority's vote, distinct responses."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sums import ClusterSums, PromptMean, Ratio, check_same_vector, clustered_ratio

NO_ANSWER = -1
"""Stands where a response has no answer that could be extracted, or there is no response."""


def pass_at_k(correct: Tensor, samples: Tensor, k: int) -> Tensor:
    """Probability that one of `k` samples is right, without bias, for each prompt.

    `1 - C(n - c, k) / C(n, k)` for `c` right ones of `n` samples (Chen et al. 2021, arXiv
    2107.03374).

    Args:
        correct: (P,) long, right samples of each prompt.
        samples: (P,) long, all samples of each prompt.
        k: at least 1, at most the smallest number of samples.

    Returns:
        (P,) float64.

    Raises:
        ValueError: if `k` is out of range, or `correct` is not between 0 and `samples`.
    """
    check_same_vector(correct, samples)
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, not {k}")
    if (samples < k).any():
        raise ValueError(f"pass@{k} needs {k} samples of each prompt, one has {int(samples.min())}")
    if ((correct < 0) | (correct > samples)).any():
        raise ValueError("the correct samples must number between 0 and all samples")
    drawn = torch.arange(k, device=samples.device)
    # Drawing without replacement: draw j fails like those before it with (n - c - j) / (n - j).
    # With fewer wrong ones than draws one factor is 0, and with it the product.
    wrong_left = (samples - correct).double()[:, None] - drawn
    left = samples.double()[:, None] - drawn
    return 1 - (wrong_left / left).prod(dim=1)


class PassAtK(PromptMean):
    """Mean of `pass_at_k` over prompts; NaN without any prompt.

    Args:
        k: at least 1.
        **kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: as `pass_at_k` does.
    """

    higher_is_better = True

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"pass@k needs k of at least 1, not {k}")
        self.k = k

    def update(self, correct: Tensor, samples: Tensor) -> None:
        """Adds prompts: (P,) right and (P,) all samples of each. A prompt comes in one call."""
        self.add(pass_at_k(correct, samples, self.k))


def majority_vote(answers: Tensor, right: Tensor) -> Tensor:
    """Whether the most frequent answer is right, for each prompt: maj@n (self-consistency, arXiv 2203.11171).

    Among answers that are equally frequent one would be drawn: the right one counts as one over their number, the
    expected value of the draw. A response without an answer has no vote; a prompt without any vote is wrong.

    Args:
        answers: (P, n) long, the class of each response's answer, alike for answers that mean the same: 0 or more,
            or -1 where a response has no answer or a prompt has fewer than n responses.
        right: (P,) long, the class of the right answer, 0 or more; one that no response gave is in nobody's `answers`.

    Returns:
        (P,) float64, between 0 and 1.

    Raises:
        ValueError: if the shapes do not fit, or a class is out of range.
    """
    if answers.ndim != 2 or right.shape != answers.shape[:1]:
        shapes = f"{tuple(answers.shape)} and {tuple(right.shape)}"
        raise ValueError(f"a vote takes answers of shape (P, n) and right ones of shape (P,), got {shapes}")
    if (answers < NO_ANSWER).any() or (right < 0).any():
        raise ValueError("classes of answers number from 0, with -1 for no answer; the right one is 0 or more")
    voted = answers != NO_ANSWER
    voter = torch.arange(len(answers), device=answers.device)[:, None].expand_as(answers)
    candidates, votes = torch.unique(torch.stack([voter[voted], answers[voted]]), dim=1, return_counts=True)
    prompt, answer = candidates
    none = torch.zeros(len(answers), dtype=torch.float64, device=answers.device)
    most = none.scatter_reduce(0, prompt, votes.double(), "amax")
    leads = votes == most[prompt]
    leaders = none.index_add(0, prompt, leads.double())
    won = none.index_add(0, prompt, (leads & (answer == right[prompt])).double())
    return won / leaders.clamp(min=1)


class MajorityVote(PromptMean):
    """Mean of `majority_vote` over prompts; NaN without any prompt."""

    higher_is_better = True

    def update(self, answers: Tensor, right: Tensor) -> None:
        """Adds prompts: (P, n) answers and (P,) right ones, as in `majority_vote`. A prompt comes in one call."""
        self.add(majority_vote(answers, right))


def distinct_responses(responses: Sequence[Hashable], prompts: Tensor) -> Tensor:
    """How many different responses each prompt has.

    Args:
        responses: B texts, or anything else that can be hashed and compared, such as tuples of token ids.
        prompts: (B,) long, the number of each response's prompt.

    Returns:
        (P,) float64, in the order of the prompts' numbers.

    Raises:
        ValueError: if there are not as many of both.
    """
    return _distinct_and_all(responses, prompts)[0]


def distinct_share(responses: Sequence[Hashable], prompts: Tensor) -> Ratio:
    """Different responses to a prompt, over all responses; its standard error counts prompts.

    1 where no prompt has two responses alike, 1/n where all of its n are the same. It falls as n grows: comparable
    between equal n alone.

    Args:
        responses: as in `distinct_responses`.
        prompts: likewise.
    """
    return clustered_ratio(*_distinct_and_all(responses, prompts))


def _distinct_and_all(responses: Sequence[Hashable], prompts: Tensor) -> tuple[Tensor, Tensor]:
    if prompts.shape != (len(responses),):
        raise ValueError(f"{len(responses)} responses have {len(responses)} prompts, got shape {tuple(prompts.shape)}")
    numbers, index = prompts.unique(return_inverse=True)
    different = set(zip(index.tolist(), responses, strict=True))
    owners = index.new_tensor([prompt for prompt, _ in different])
    distinct, total = (torch.bincount(each, minlength=len(numbers)).double() for each in (owners, index))
    return distinct, total


class DistinctShare(ClusterSums):
    """`distinct_share` of all responses seen."""

    higher_is_better = True

    def update(self, responses: Sequence[Hashable], prompts: Tensor) -> None:
        """Adds B responses and the (B,) numbers of their prompts. All responses to a prompt come in one call."""
        self.add(*_distinct_and_all(responses, prompts))
