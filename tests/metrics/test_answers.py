"""pass@k, majority@k and the share of distinct responses, by hand and by enumeration."""

from collections import Counter
from itertools import product

import pytest
import torch

from erpd_lightning.metrics import (
    PassAtK,
    distinct_responses,
    majority_correct,
    pass_at_k,
)
from support import reference


@pytest.mark.parametrize(
    ("correct", "samples", "k", "expected"),
    [(1, 2, 1, 1 / 2), (1, 4, 2, 1 / 2), (2, 4, 2, 5 / 6), (0, 4, 4, 0.0), (3, 4, 2, 1.0)],
)
def test_pass_at_k_by_hand(correct: int, samples: int, k: int, expected: float) -> None:
    result = pass_at_k(torch.tensor([correct]), torch.tensor([samples]), k)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([expected], abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(k: int) -> None:
    cases = [(c, n) for n in range(k, 9) for c in range(n + 1)]
    correct, samples = torch.tensor(cases).unbind(1)
    expected = [reference.share_of_subsets_with_a_correct_one(c, n, k) for c, n in cases]
    assert pass_at_k(correct, samples, k).tolist() == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    correct, samples = torch.tensor([1, 5000]), torch.tensor([10_000, 10_000])
    first, second = pass_at_k(correct, samples, 1000).tolist()
    assert first == pytest.approx(0.1, rel=1e-12)
    assert second == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], [2], 3, "pass@3 needs 3 samples of each prompt, one has 2"),
        ([1], [2], 0, "k of at least 1"),
        ([3], [2], 1, "between 0 and all samples"),
        ([-1], [2], 1, "between 0 and all samples"),
        ([1, 1], [2], 1, "one entry per prompt"),
    ],
)
def test_pass_at_k_refuses(correct: list[int], samples: list[int], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(torch.tensor(correct), torch.tensor(samples), k)


def test_pass_at_k_metric_refuses_k_when_built() -> None:
    with pytest.raises(ValueError, match="k of at least 1"):
        PassAtK(0)


def test_distinct_responses_by_hand() -> None:
    responses = ["1", "2", "1", "1", "1", "2"]
    prompts = torch.tensor([7, 7, 7, 3, 3, 9])
    assert distinct_responses(responses, prompts).tolist() == [1.0, 2.0, 1.0]  # prompts 3, 7 and 9
    as_tokens = [tuple(response) for response in responses]
    assert distinct_responses(as_tokens, prompts).tolist() == [1.0, 2.0, 1.0]
    assert distinct_responses([], torch.zeros(0).long()).tolist() == []
    with pytest.raises(ValueError, match=r"6 responses have 6 prompts, got shape \(5,\)"):
        distinct_responses(responses, prompts[:5])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("4 4 5", 1.0),  # 4 is the correct one
        ("5 5 4", 0.0),
        ("5 4", 0.5),  # a tie
        ("5 6 4", 1 / 3),
        ("- - 4", 1.0),  # those without an answer have no vote
        ("- -", 0.0),
        ("4", 1.0),
    ],
)
def test_majority_by_hand(answers: str, expected: float) -> None:
    given = [None if answer == "-" else answer for answer in answers.split()]
    correct = torch.tensor([answer == "4" for answer in given])
    result = majority_correct(given, correct, torch.zeros(len(given)).long())
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([expected], abs=1e-15)


def test_majority_is_that_of_each_prompt() -> None:
    """All votes of five responses among three answers, in one call, against counting."""
    cases = list(product("ab-", repeat=5))
    answers = [None if answer == "-" else answer for case in cases for answer in case]
    prompts = torch.arange(len(cases)).repeat_interleave(5)
    found = majority_correct(answers, torch.tensor([answer == "a" for answer in answers]), prompts)
    for case, value in zip(cases, found.tolist(), strict=True):
        votes = Counter(case)
        ours, theirs = votes["a"], votes["b"]
        assert value == (0.5 if ours == theirs > 0 else float(ours > theirs))


def test_majority_where_verdicts_on_an_answer_differ() -> None:
    correct = torch.tensor([True, False, True, True])
    assert majority_correct(["a", "a", "a", "b"], correct, torch.zeros(4).long()).tolist() == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match=r"3 answers have as many verdicts and prompts, got shapes \(4,\) and \(4,\)"):
        majority_correct(["a", "a", "a"], correct, torch.zeros(4).long())
    assert majority_correct([], torch.zeros(0).bool(), torch.zeros(0).long()).tolist() == []
