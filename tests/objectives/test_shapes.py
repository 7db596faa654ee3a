"""Arguments of another shape are refused where they would be broadcast in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import (
    CISPO,
    GSPO,
    SAPO,
    ClippedPolicyGradient,
    CrossEntropy,
    ExtremeObjective,
    PPOClip,
    Signal,
    SquaredError,
    TiltedTarget,
    clipped_surrogate,
    exact_kl,
    geometric_mixture,
    group_advantages,
    kl_loss,
    kl_value,
    masked_sum,
    mean_tilted_kl,
    solve_beta,
    solve_two_references,
    tilt,
    tilt_two_references,
    tilted_kl,
)
from erpd_lightning.objectives.shapes import check_shape

EXTREME = [SAPO(), CrossEntropy(), PPOClip(), GSPO(), CISPO(), SquaredError("sequence"), SquaredError("token")]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def test_both_shapes_are_said_and_any_size_fits_none() -> None:
    check_shape((None, 3), logps=zeros(5, 3), old_logps=zeros(0, 3))
    with pytest.raises(ValueError, match=r"^old_logps has shape \(5, 2\); it has to be \(any, 3\)$"):
        check_shape((None, 3), logps=zeros(5, 3), old_logps=zeros(5, 2))
    with pytest.raises(ValueError, match=r"^logps has shape \(3,\); it has to be \(any, 3\)$"):
        check_shape((None, 3), logps=zeros(3))


@pytest.mark.parametrize("objective", EXTREME, ids=lambda o: f"{type(o).__name__}-{o.per}")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("logps", (3,)),
        ("old_logps", (3, 1)),
        ("old_logps", (3,)),
        ("mask", (3,)),
        ("rewards", (3, 1)),
        ("rewards", (1,)),
        ("advantages", (3, 1)),
        ("advantages", (1,)),
        ("advantages", (3, 3)),
    ],
)
def test_of_the_extreme_region(objective: ExtremeObjective, name: str, shape: tuple[int, ...]) -> None:
    """With as many tokens as responses nothing else would notice."""
    arguments = {
        "logps": zeros(3, 3),
        "old_logps": zeros(3, 3),
        "mask": torch.ones(3, 3).bool(),
        "rewards": zeros(3),
        "advantages": zeros(3),
    }
    objective(**arguments)
    with pytest.raises(ValueError, match=rf"^{name} has shape"):
        objective(**{**arguments, name: torch.ones(shape, dtype=arguments[name].dtype)})


@pytest.mark.parametrize("name", ["old_logps", "sampler_logps", "signal", "kl"])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_of_the_clipped_policy_gradient(name: str, shape: tuple[int, ...]) -> None:
    arguments = {key: zeros(3, 3) for key in ("logps", "old_logps", "sampler_logps", "signal", "kl")}
    with pytest.raises(ValueError, match=rf"^{name} has shape"):
        ClippedPolicyGradient()(**{**arguments, name: zeros(*shape)}, beta=1.0)


SQUARE, ROW = zeros(3, 3), zeros(3)
OTHER_SHAPES: list[tuple[str, Callable[[], Any]]] = [
    ("base", lambda: TiltedTarget()(SQUARE, ROW, SQUARE, 1.0)),
    ("signal", lambda: TiltedTarget()(SQUARE, SQUARE, ROW, 1.0)),
    ("logq", lambda: exact_kl(SQUARE, ROW)),
    ("logq", lambda: kl_value(SQUARE, ROW, "k1")),
    ("sampler_logps", lambda: kl_value(SQUARE, SQUARE, "k1", sampler_logps=ROW)),
    ("ref_logps", lambda: kl_loss(SQUARE, ROW, direction="reverse", estimator="k2")),
    ("sampler_logps", lambda: kl_loss(SQUARE, SQUARE, direction="reverse", estimator="k2", sampler_logps=ROW)),
    ("mask", lambda: masked_sum(SQUARE, ROW.bool())),
    ("mask", lambda: masked_sum(ROW, SQUARE.bool())),
    ("rewards", lambda: group_advantages(SQUARE, SQUARE.long())),
    ("groups", lambda: group_advantages(ROW, SQUARE.long())),
    ("advantages", lambda: clipped_surrogate(SQUARE, ROW, 0.2, 0.2)),
    ("signal", lambda: tilt(SQUARE, ROW, 1.0)),
    ("signal", lambda: tilted_kl(SQUARE, ROW, 1.0)),
    ("signal", lambda: mean_tilted_kl(SQUARE, ROW, 1.0)),
    ("base", lambda: mean_tilted_kl(zeros(2, 3, 4), zeros(2, 3, 4), 1.0)),
    ("base", lambda: solve_beta(zeros(2, 3, 4), zeros(2, 3, 4), 0.1)),
    ("first", lambda: geometric_mixture(SQUARE, ROW, 0.5)),
    ("first", lambda: tilt_two_references(SQUARE, ROW, SQUARE, 1.0, 1.0)),
    ("signal", lambda: tilt_two_references(SQUARE, SQUARE, ROW, 1.0, 1.0)),
    ("first", lambda: solve_two_references(SQUARE, ROW, SQUARE, 0.1, 0.1)),
    ("signal", lambda: solve_two_references(SQUARE, SQUARE, ROW, 0.1, 0.1)),
    ("unlearned", lambda: Signal()({"teacher": SQUARE, "unlearned": ROW})),
]


@pytest.mark.parametrize(("name", "call"), OTHER_SHAPES, ids=lambda x: x if isinstance(x, str) else "")
def test_of_functions(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape"):
        call()
