"""Interpolation between the weights of two policies."""

import copy

import pytest
import torch

from erpd_lightning.budget.interpolation import WeightInterpolation
from support.policies import make_model


def test_weights_at_an_alpha() -> None:
    start, end = make_model(0), make_model(1)
    origin, target = copy.deepcopy(start.state_dict()), copy.deepcopy(end.state_dict())
    interpolation = WeightInterpolation(start.parameters(), end.parameters())
    interpolation.move_to(0.25)
    for name, weight in end.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * origin[name] + 0.25 * target[name])
    interpolation.move_to(0.0)
    assert all(torch.equal(weight, origin[name]) for name, weight in end.state_dict().items())
    interpolation.move_to(1.0)
    assert all(torch.equal(weight, target[name]) for name, weight in end.state_dict().items())
    assert all(torch.equal(weight, origin[name]) for name, weight in start.state_dict().items())


def test_policies_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="argument"):
        WeightInterpolation(torch.nn.Linear(2, 2).parameters(), torch.nn.Linear(2, 2, bias=False).parameters())
