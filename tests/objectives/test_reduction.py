from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import masked_mean, masked_sum
from support import reference
from support.reference import grad

Reduce = Callable[[Tensor, Tensor], Tensor]
Expected = Callable[[Any, Any], float]
REDUCTIONS = [(masked_sum, reference.masked_sum), (masked_mean, reference.masked_mean)]
both = pytest.mark.parametrize(("reduce", "expected"), REDUCTIONS, ids=["sum", "mean"])


def some_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape) < 0.5
    mask.view(-1)[0], mask.view(-1)[1] = True, False
    return mask


def test_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_sum(values, mask).item() == 9.0  # 1 + 3 + 5
    assert masked_mean(values, mask).item() == 3.0  # 9 / 3 counted, not 9 / 6
    assert masked_mean(values, values == 5.0).item() == 5.0  # one counted: 5 / 1


@both
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_agrees_with_reference(reduce: Reduce, expected: Expected, shape: tuple[int, ...]) -> None:
    values, mask = torch.randn(shape, dtype=torch.float64), some_mask(shape)
    result = reduce(values, mask)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected(values, mask), rel=1e-12, abs=1e-12)


@both
def test_gradient(reduce: Reduce, expected: Expected) -> None:
    values = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = some_mask((3, 5))
    assert torch.autograd.gradcheck(lambda values: reduce(values, mask), values)
    (gradient,) = torch.autograd.grad(reduce(values, mask), values)
    share = 1.0 if reduce is masked_sum else 1.0 / mask.sum().item()
    torch.testing.assert_close(gradient, mask.double() * share)


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_out_values_do_not_leak(reduce: Reduce, expected: Expected, poison: float) -> None:
    clean, mask = torch.randn(3, 5, dtype=torch.float64), some_mask((3, 5))
    values = clean.masked_fill(~mask, poison).requires_grad_()
    result = reduce(values, mask)
    assert result.item() == pytest.approx(expected(clean, mask), rel=1e-12)
    result.backward()
    assert torch.isfinite(grad(values)).all()
    assert (grad(values)[~mask] == 0).all()
    assert (grad(values)[mask] > 0).all()


@both
@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)])
def test_empty_mask_is_zero_and_runs_backward(
    reduce: Reduce, expected: Expected, poison: float, shape: tuple[int, ...]
) -> None:
    values = torch.full(shape, poison, requires_grad=True)
    result = reduce(values, torch.zeros(shape, dtype=torch.bool))
    assert result.item() == 0.0
    result.backward()
    assert torch.equal(grad(values), torch.zeros(shape))


@both
def test_padding_changes_nothing(reduce: Reduce, expected: Expected) -> None:
    values, mask = torch.randn(3, 5, dtype=torch.float64), some_mask((3, 5))
    padded = torch.nn.functional.pad(values, (0, 4), value=float("nan"))
    padded_mask = torch.nn.functional.pad(mask, (0, 4), value=False)
    assert reduce(padded, padded_mask).item() == pytest.approx(reduce(values, mask).item(), rel=1e-12)
