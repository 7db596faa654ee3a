import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import masked_sum
from support import reference
from support.reference import grad


def some_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape) < 0.5
    mask.view(-1)[0], mask.view(-1)[1] = True, False
    return mask


def test_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_sum(values, mask).item() == 9.0  # 1 + 3 + 5
    assert masked_sum(values, values == 5.0).item() == 5.0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_agrees_with_reference(shape: tuple[int, ...]) -> None:
    values, mask = torch.randn(shape, dtype=torch.float64), some_mask(shape)
    result = masked_sum(values, mask)
    assert result.shape == ()
    assert result.item() == pytest.approx(reference.masked_sum(values, mask), rel=1e-12, abs=1e-12)


def test_gradient() -> None:
    values = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = some_mask((3, 5))
    assert torch.autograd.gradcheck(lambda values: masked_sum(values, mask), values)
    (gradient,) = torch.autograd.grad(masked_sum(values, mask), values)
    torch.testing.assert_close(gradient, mask.double())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_out_values_do_not_leak(poison: float) -> None:
    clean, mask = torch.randn(3, 5, dtype=torch.float64), some_mask((3, 5))
    values = clean.masked_fill(~mask, poison).requires_grad_()
    result = masked_sum(values, mask)
    assert result.item() == pytest.approx(reference.masked_sum(clean, mask), rel=1e-12)
    result.backward()
    assert torch.isfinite(grad(values)).all()
    assert (grad(values)[~mask] == 0).all()
    assert (grad(values)[mask] > 0).all()


@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)])
def test_empty_mask_is_zero_and_runs_backward(poison: float, shape: tuple[int, ...]) -> None:
    values = torch.full(shape, poison, requires_grad=True)
    result = masked_sum(values, torch.zeros(shape, dtype=torch.bool))
    assert result.item() == 0.0
    result.backward()
    assert torch.equal(grad(values), torch.zeros(shape))


def test_padding_changes_nothing() -> None:
    values, mask = torch.randn(3, 5, dtype=torch.float64), some_mask((3, 5))
    padded = torch.nn.functional.pad(values, (0, 4), value=float("nan"))
    padded_mask = torch.nn.functional.pad(mask, (0, 4), value=False)
    assert masked_sum(padded, padded_mask).item() == pytest.approx(masked_sum(values, mask).item(), rel=1e-12)
