"""Accuracy and diversity of the responses to a prompt: pass@k, majority@k and the number of distinct responses."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sums import ClusteredRatio, check_same_vector


def pass_at_k(correct: Tensor, samples: Tensor, k: int) -> Tensor:
    """Probability that at least one of `k` samples is correct, without bias, for each prompt.

    `1 - C(n - c, k) / C(n, k)` for `c` correct ones of `n` samples (Chen et al. 2021, arXiv
    2107.03374).

    Args:
        correct: (P,) long, correct samples of each prompt.
        samples: (P,) long, all samples of each prompt.
        k: At least 1, at most the smallest number of samples.

    Returns:
        (P,) float64.

    Raises:
        ValueError: If the shapes do not fit, `k` is out of range, or `correct` is not between 0 and `samples`.

    Example:
        >>> pass_at_k(torch.tensor([1, 0]), torch.tensor([4, 4]), k=2)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    check_same_vector(correct, samples)
    _check_k(k)
    if (samples < k).any():
        raise ValueError(f"pass@{k} needs {k} samples of each prompt, one has {int(samples.min())}")
    if ((correct < 0) | (correct > samples)).any():
        raise ValueError("the correct samples must number between 0 and all samples")
    drawn = torch.arange(k, device=samples.device)
    # Drawing without replacement: draw j fails like those before it with (n - c - j) / (n - j).
    # With fewer incorrect ones than draws one factor is 0, and with it the product.
    incorrect_left = (samples - correct).double()[:, None] - drawn
    left = samples.double()[:, None] - drawn
    return 1 - (incorrect_left / left).prod(dim=1)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, not {k}")


class PassAtK(ClusteredRatio):
    """Mean of `pass_at_k` over prompts and its standard error, a `Ratio`; NaN without any prompt.

    Args:
        k: At least 1.
        **kwargs: Those of `torchmetrics.Metric`.

    Raises:
        ValueError: As `pass_at_k` does.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([1]), torch.tensor([4]))
        >>> metric.update(torch.tensor([0]), torch.tensor([4]))
        >>> metric.compute().value, metric.compute().stderr
        (tensor(0.2500, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """

    higher_is_better = True

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_k(k)
        self.k = k

    def update(self, correct: Tensor, samples: Tensor) -> None:
        """Add prompts: (P,) correct and (P,) all samples of each. A prompt comes in one call."""
        values = pass_at_k(correct, samples, self.k)
        super().update(values, torch.ones_like(values))


def majority_correct(answers: Sequence[Hashable | None], correct: Tensor, prompts: Tensor) -> Tensor:
    """Whether the most frequent answer of each prompt is correct: majority@k, where k is the number of its responses.

    Between answers that are equally frequent one is drawn, so that the value of a tie is the mean. A response without
    an answer has no vote, and a prompt without any vote is not correct. Where verdicts on one answer differ, it counts
    by the share of those that are correct.

    Args:
        answers: The final answers of B responses, in a form in which equal ones compare equal; None for no answer.
        correct: (B,) bool, whether each response is correct.
        prompts: (B,) long, the number of each response's prompt.

    Returns:
        (P,) float64 between 0 and 1, in the order of the prompts' numbers.

    Raises:
        ValueError: If there are not as many of each.

    Example:
        >>> correct, prompts = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 0, 1])
        >>> majority_correct(["4", "5", "4", None], correct, prompts)
        tensor([1., 0.], dtype=torch.float64)
    """
    if not prompts.shape == correct.shape == (len(answers),):
        shapes = f"{tuple(correct.shape)} and {tuple(prompts.shape)}"
        raise ValueError(f"{len(answers)} answers have as many verdicts and prompts, got shapes {shapes}")
    numbers, index = prompts.unique(return_inverse=True)
    votes: list[dict[Hashable, list[bool]]] = [defaultdict(list) for _ in numbers]
    for prompt, answer, verdict in zip(index.tolist(), answers, correct.tolist(), strict=True):
        if answer is not None:
            votes[prompt][answer].append(verdict)
    return torch.tensor([_winners_correct(of_prompt) for of_prompt in votes], dtype=torch.float64)


def _winners_correct(votes: dict[Hashable, list[bool]]) -> float:
    most = max(map(len, votes.values()), default=0)
    winners = [sum(verdicts) / most for verdicts in votes.values() if len(verdicts) == most]
    return sum(winners) / len(winners) if winners else 0.0


def distinct_responses(responses: Sequence[Hashable], prompts: Tensor) -> Tensor:
    """Number of distinct responses of each prompt.

    Args:
        responses: B texts, or anything else that can be hashed and compared, such as tuples of token ids.
        prompts: (B,) long, the number of each response's prompt.

    Returns:
        (P,) float64, in the order of the prompts' numbers.

    Raises:
        ValueError: If there are not as many of both.

    Example:
        >>> distinct_responses(["1", "2", "1", "1"], torch.tensor([7, 7, 7, 3]))
        tensor([1., 2.], dtype=torch.float64)
    """
    if prompts.shape != (len(responses),):
        raise ValueError(f"{len(responses)} responses have {len(responses)} prompts, got shape {tuple(prompts.shape)}")
    numbers, index = prompts.unique(return_inverse=True)
    distinct = set(zip(index.tolist(), responses, strict=True))
    owners = index.new_tensor([prompt for prompt, _ in distinct])
    return torch.bincount(owners, minlength=len(numbers)).double()
