import pytest
import torch

from erpd_lightning.objectives import group_advantages
from support import reference


def test_by_hand() -> None:
    # group 5: mean 1/4, variance (0.75^2 + 3 * 0.25^2) / 3 = 1/4, std 1/2
    #   0.75 / 0.5001 = 1.49970006,  -0.25 / 0.5001 = -0.49990002
    # group 2: mean 1/2, variance (0.5^2 + 0.5^2) / 1 = 1/2, std 0.70710678
    #   0.5 / 0.70720678 = 0.70700679
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    groups = torch.tensor([5, 2, 5, 2, 5, 5])
    expected = [1.49970006, -0.70700679, -0.49990002, 0.70700679, -0.49990002, -0.49990002]
    result = group_advantages(rewards, groups)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("offset", [0, -3, 10**12])
def test_agrees_with_reference_for_scattered_groups_of_unequal_size(offset: int) -> None:
    rewards = torch.randn(60)
    groups = torch.randint(0, 9, (60,)) + offset
    expected = reference.group_advantages(rewards, groups)
    assert group_advantages(rewards, groups).numpy() == pytest.approx(expected, abs=1e-5)


def test_binary_rewards_agree_with_reference() -> None:
    rewards = (torch.rand(200) < 0.3).float()
    groups = torch.randint(0, 25, (200,))
    expected = reference.group_advantages(rewards, groups)
    assert group_advantages(rewards, groups).numpy() == pytest.approx(expected, abs=1e-5)


def test_order_of_responses_does_not_matter() -> None:
    rewards, groups = torch.randn(40), torch.randint(0, 6, (40,))
    order = torch.randperm(40)
    shuffled = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(shuffled, group_advantages(rewards, groups)[order])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.7, 1e6])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_of_equal_rewards_is_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    # 0.1 is not a binary fraction: (0.1 + 0.1 + 0.1) / 3 is not 0.1
    rewards = torch.full((size + 2,), reward, dtype=dtype)
    rewards[-2:] = torch.tensor([0.0, 1.0])
    groups = torch.tensor([3] * size + [1, 1])
    result = group_advantages(rewards, groups)
    assert (result[:-2] == 0).all()
    assert result[-2:].tolist() == pytest.approx([-0.70700679, 0.70700679], abs=1e-6)


def test_rewards_far_from_zero_keep_their_spread() -> None:
    # float32 rounds the mean 10000 1/3 by 3e-4, and E[x^2] - E[x]^2 loses the spread altogether
    rewards = torch.tensor([10000.0, 10001.0, 10000.0])
    result = group_advantages(rewards, torch.zeros(3, dtype=torch.long))
    # variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.57735027: (2/3) / 0.57745027 = 1.15450053
    assert result.tolist() == pytest.approx([-0.57725026, 1.15450053, -0.57725026], abs=1e-6)


def test_float64_rewards_and_no_rewards() -> None:
    rewards, groups = torch.tensor([0.0, 1.0]).double(), torch.tensor([0, 0])
    assert group_advantages(rewards, groups).dtype == torch.float32
    empty = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)
