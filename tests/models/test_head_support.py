"""The support of a distribution, and log-probs on it, against full logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erpd_lightning.models.head import select_support, support_logps, token_logps
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support import reference
from support.heads import (
    CUTS,
    HEADS,
    N,
    V,
    as_logits,
    assert_same_gradients,
    in_float64,
    leaves,
    reference_logits,
    some_head,
    some_hidden,
)
from support.reference import grad


def some_ids() -> Tensor:
    """Distinct entries, from none but one to three of them padding."""
    ids = torch.stack([torch.randperm(V)[:4] for _ in range(N)])
    for row in range(N):
        ids[row, 4 - row % 4 :] = -1
    return ids


# select_support


def chosen(ids: Tensor) -> list[list[int]]:
    """The entries of each row, padding checked to be at the end and dropped."""
    rows = []
    for row in ids.tolist():
        size = sum(1 for v in row if v >= 0)
        assert row[size:] == [-1] * (len(row) - size)
        assert len(set(row[:size])) == size
        rows.append(row[:size])
    return rows


def test_select_support_by_hand() -> None:
    head, hidden = as_logits(np.log([[0.1, 0.6, 0.3], [0.98, 0.01, 0.01]]).tolist())
    ids = select_support(head, hidden, mass=0.85)
    # .6 + .3 = .9 >= .85; .98 >= .85
    assert ids.dtype == torch.long
    assert ids.tolist() == [[1, 2], [0, -1]]
    assert select_support(head, hidden, mass=0.5).tolist() == [[1], [0]]


@HEADS
@CUTS
@pytest.mark.parametrize("mass", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("max_size", [1, 3, 64])
def test_select_support_is_the_smallest_set(
    max_logits: int, options: dict[str, Any], mass: float, max_size: int
) -> None:
    head, hidden = some_head(**options), some_hidden()
    ids = select_support(head, hidden, mass=mass, max_size=max_size, max_logits=max_logits)
    logp = reference.log_softmax(reference_logits(head, hidden))
    expected = [reference.smallest_support(row, mass, max_size) for row in logp]
    assert [sorted(row) for row in chosen(ids)] == [sorted(row) for row in expected]
    assert ids.shape == (N, max(len(row) for row in expected))


def test_select_support_defaults() -> None:
    # 200 equal entries: .999 needs all of them, the cap is 64
    head, hidden = as_logits([[0.0] * 200])
    (row,) = chosen(select_support(head, hidden))
    assert len(row) == 64
    # .9985 + .0014 + .0001: one entry is not .999
    head, hidden = as_logits(np.log([[0.9985, 0.0014, 0.0001]]).tolist())
    assert chosen(select_support(head, hidden)) == [[0, 1]]


@pytest.mark.parametrize("max_logits", [1, 10**6])
def test_select_support_width_is_the_largest_size_of_all_chunks(max_logits: int) -> None:
    peaked, flat = [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    head, hidden = as_logits([peaked, flat, peaked])
    ids = select_support(head, hidden, mass=0.6, max_logits=max_logits)
    assert [len(row) for row in chosen(ids)] == [1, 3, 1]
    assert ids.shape == (3, 3)
    head, hidden = as_logits([peaked, peaked])
    assert select_support(head, hidden, max_logits=max_logits).tolist() == [[0], [0]]


def test_select_support_of_ties_and_of_everything() -> None:
    head, hidden = as_logits([[0.0] * 10])
    (row,) = chosen(select_support(head, hidden, mass=0.45))
    assert len(row) == 5  # any five of the ten
    # the rounded sum of all may stay below 1: there is nothing more to take
    (row,) = chosen(select_support(head, hidden, mass=1.0))
    assert sorted(row) == list(range(10))
    # two tied at the edge of the cap: the first is sure, either of the two others will do
    head, hidden = as_logits(np.log([[0.6, 0.2, 0.2]]).tolist())
    (row,) = chosen(select_support(head, hidden, mass=0.99, max_size=2))
    assert 0 in row
    assert len(row) == 2


def test_select_support_stops_as_soon_as_the_mass_is_reached() -> None:
    # exp(-200) is 0 in float32: the first entry has all the mass, and reaching it is enough
    head, hidden = as_logits([[0.0, -200.0]])
    assert select_support(head, hidden, mass=1.0).tolist() == [[0]]


@pytest.mark.parametrize("mass", [0.0, -0.5, 1.5, float("nan")])
def test_select_support_refuses_a_mass_that_is_no_probability(mass: float) -> None:
    with pytest.raises(ValueError, match="mass"):
        select_support(some_head(), some_hidden(), mass=mass)


def test_select_support_refuses_an_empty_support() -> None:
    with pytest.raises(ValueError, match="max_size"):
        select_support(some_head(), some_hidden(), max_size=0)


def test_select_support_builds_no_graph() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        select_support(some_head(), some_hidden(), max_logits=2 * V)
        assert not saved
        token_logps(some_head(), some_hidden(), torch.arange(N), max_logits=N * V)
        assert saved  # the hook works


def test_select_support_has_no_gradient_and_survives_extremes() -> None:
    head, hidden = as_logits([[1e4, -1e4, 0.0], [1e4, 1e4, 0.0]])
    ids = select_support(head, hidden)
    assert not ids.requires_grad
    assert [sorted(row) for row in chosen(ids)] == [[0], [0, 1]]


# support_logps


def test_support_logps_by_hand() -> None:
    head, hidden = as_logits(np.log([[0.5, 0.25, 0.125, 0.125]]).tolist())
    result = support_logps(head, hidden, torch.tensor([[2, 0, -1]]))
    # ln .125, ln .5, padding, ln(.25 + .125)
    assert result[0].tolist() == pytest.approx([-2.0794415, -0.6931472, -100, -0.9808293], abs=1e-6)


@HEADS
@CUTS
def test_support_logps_agree_with_full_logits(max_logits: int, options: dict[str, Any]) -> None:
    head, hidden, ids = some_head(**options), some_hidden(), some_ids()
    result = support_logps(head, hidden, ids, max_logits=max_logits)
    assert result.dtype == torch.float32
    expected = reference.support_logps(reference_logits(head, hidden), ids)
    assert result.detach().numpy() == pytest.approx(expected, abs=1e-5)
    assert result.detach().exp().sum(-1).tolist() == pytest.approx([1.0] * N, abs=1e-5)

    exact, full = in_float64(head, hidden)
    rows = []
    for n in range(N):
        kept = [v for v in ids[n].tolist() if v >= 0]
        rest = [v for v in range(V) if v not in kept]
        pads = [torch.tensor(LOG_ZERO).double()] * (4 - len(kept))
        rows.append(torch.stack([*full[n, kept], *pads, full[n, rest].logsumexp(0)]))
    assert_same_gradients(result, leaves(head, hidden), torch.stack(rows), exact)


@pytest.mark.parametrize("tail", [1e-3, 1e-9, 1e-20, 1e-40])
def test_support_logps_tail_is_exact_when_it_is_tiny(tail: float) -> None:
    """`1 - sum` in float32 would give 0, or 6e-8, or less than nothing."""
    log_tail = float(np.log(tail))
    # two entries share the tail; two the rest: ln .5 each to within the tail
    head, hidden = as_logits([[0.0, log_tail, log_tail, 0.0]])
    result = support_logps(head, hidden, torch.tensor([[3, 0]]))
    log_total = np.log1p(tail) + np.log(2)
    assert result[0, 2].item() == pytest.approx(log_tail + np.log(2) - log_total, abs=1e-5)
    assert result[0, :2].tolist() == pytest.approx([-log_total] * 2, abs=1e-6)
    # d log tail / d logits = (p within the tail) - p
    result[0, 2].backward()
    expected = [-0.5 / (1 + tail), 0.5 / (1 + tail), 0.5 / (1 + tail), -0.5 / (1 + tail)]
    assert grad(hidden)[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("max_logits", [4, 10**6])
def test_support_logps_of_all_the_vocabulary_have_an_empty_tail(max_logits: int) -> None:
    head, hidden = as_logits(np.log([[0.1, 0.2, 0.3, 0.4]] * 2).tolist())
    ids = torch.tensor([[3, 2, 1, 0], [0, 1, 2, -1]])
    result = support_logps(head, hidden, ids, max_logits=max_logits)
    assert result[0].exp().tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-6)
    assert result[0, 4].item() == LOG_ZERO
    assert result[1].exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.0, 0.4], abs=1e-6)
    assert result[1, 3].item() == LOG_ZERO
    (result * torch.randn(2, 5)).sum().backward()
    assert torch.isfinite(grad(hidden)).all()
    assert torch.isfinite(grad(head.weight)).all()
    # the empty tail is a constant: its slot alone moves nothing
    hidden.grad = None
    support_logps(head, hidden, ids, max_logits=max_logits)[0, 4].backward()
    assert (grad(hidden) == 0).all()


@pytest.mark.parametrize("max_logits", [3, 10**6])
def test_support_logps_of_extreme_logits_stay_finite(max_logits: int) -> None:
    head, hidden = as_logits([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 150.0, 0.0]])
    ids = torch.tensor([[0, 1], [0, 1], [1, -1]])
    result = support_logps(head, hidden, ids, max_logits=max_logits)
    assert torch.isfinite(result).all()
    assert result[0].tolist() == [0.0, -2e4, LOG_ZERO]  # the tail is floored
    assert result[1].tolist() == [-2e4, -2e4, 0.0]
    assert result[2].tolist() == [0.0, LOG_ZERO, LOG_ZERO]  # ln 2 - 150 < LOG_ZERO
    (result * torch.randn(3, 3)).sum().backward()
    assert torch.isfinite(grad(hidden)).all()
    assert torch.isfinite(grad(head.weight)).all()


def test_support_logps_at_the_selected_support() -> None:
    head, hidden = some_head(), some_hidden()
    result = support_logps(head, hidden, select_support(head, hidden, mass=0.9)).detach()
    assert (result[:, -1].exp() <= 0.1 + 1e-6).all()
    assert result.exp().sum(-1).tolist() == pytest.approx([1.0] * N, abs=1e-5)
