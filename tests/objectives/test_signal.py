import dataclasses
from typing import Any

import pytest
import torch

from erpd_lightning.objectives import Signal, Term
from support import reference

INF, NAN = float("inf"), float("nan")


def some_policies(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.log_softmax(3 * torch.randn(2, 3, 5, dtype=dtype), -1) for name in names}


def test_by_hand() -> None:
    logps = {
        "teacher": torch.tensor([0.5, 0.25, 0.25]).log(),
        "unlearned": torch.tensor([0.25, 0.5, 0.25]).log(),
    }
    # ln(.5/.25) = 0.69314718, ln(.25/.5) = -0.69314718, ln 1 = 0
    assert Signal()(logps).tolist() == pytest.approx([0.69314718, -0.69314718, 0.0], abs=1e-6)
    # weight 2, clip 0.5: 2 * 0.5 = 1, the clip comes before the weight
    clipped = Signal([Term(weight=2.0, clip=0.5)])(logps)
    assert clipped.tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


def test_defaults() -> None:
    assert Term() == Term(numerator="teacher", denominator="unlearned", weight=1.0, clip=3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Term().weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "terms",
    [
        [("teacher", "unlearned", 1.0, 3.0)],
        [("teacher", "base", 0.5, 1.0)],
        [("teacher", "base", 1.0, 2.0), ("second", "unlearned", -0.7, 0.5)],
        [("base", "teacher", 1.0, 3.0), ("teacher", "second", 0.0, 3.0)],
    ],
)
def test_agrees_with_reference(
    terms: list[tuple[str, str, float, float]], dtype: torch.dtype, tolerance: float
) -> None:
    logps = some_policies("base", "teacher", "second", "unlearned", dtype=dtype)
    result = Signal([Term(*term) for term in terms])(logps)
    assert result.shape == (2, 3, 5)
    assert result.numpy() == pytest.approx(reference.signal(logps, terms), abs=tolerance)


def test_gradient_away_from_the_clip() -> None:
    teacher = torch.randn(4, dtype=torch.float64, requires_grad=True)
    unlearned = teacher.detach() + torch.tensor([0.5, -0.5, 9.0, -9.0])
    unlearned.requires_grad_()
    signal = Signal([Term(weight=2.0)])
    assert torch.autograd.gradcheck(lambda t, u: signal({"teacher": t, "unlearned": u}), (teacher, unlearned))


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ([Term()], ["teacher", "unlearned"]),
        ([Term("b", "a"), Term("c", "a"), Term("b", "c")], ["a", "b", "c"]),
    ],
)
def test_policies_are_the_names_used(terms: list[Term], names: list[str]) -> None:
    assert list(Signal(terms).policies) == names


@pytest.mark.parametrize(
    ("teacher", "unlearned", "expected"),
    [
        (0.0, -1e4, 3.0),
        (-1e4, 0.0, -3.0),
        (0.0, -INF, 3.0),
        (-INF, 0.0, -3.0),
        (-100.0, -100.0, 0.0),  # padding in every policy
    ],
)
def test_extreme_ratios_are_clipped(teacher: float, unlearned: float, expected: float) -> None:
    result = Signal()({"teacher": torch.tensor([teacher]), "unlearned": torch.tensor([unlearned])})
    assert result.tolist() == [expected]


@pytest.mark.parametrize("missing", ["teacher", "unlearned"])
def test_a_missing_policy_is_named(missing: str) -> None:
    logps = some_policies("base", "teacher", "unlearned")
    del logps[missing]
    with pytest.raises(ValueError, match=missing):
        Signal()(logps)


@pytest.mark.parametrize(
    "terms",
    [
        [],
        [{"numerator": "teacher", "denominator": "teacher"}],
        [{}, {"numerator": "base", "denominator": "base"}],
        [{"clip": 0.0}],
        [{"clip": -1.0}],
        [{"clip": NAN}],
        [{"weight": 0.0}],
        [{"weight": 0.0}, {"weight": 0.0, "numerator": "base"}],
        [{"weight": NAN}],
        [{"weight": INF}],
        [{}, {"weight": -INF}],
    ],
)
def test_refused(terms: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Signal([Term(**term) for term in terms])


def test_terms_cannot_be_changed_behind_the_checks() -> None:
    terms = [Term()]
    signal = Signal(terms)
    terms.append(Term("second", "base"))
    assert list(signal.policies) == ["teacher", "unlearned"]


def test_one_weight_may_be_zero() -> None:
    logps = some_policies("base", "teacher", "unlearned")
    both = Signal([Term(), Term("teacher", "base", weight=0.0)])
    torch.testing.assert_close(both(logps), Signal()(logps))
