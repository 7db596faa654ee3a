import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erpd_lightning.models.head import MAX_LOGITS, Head, divergence, select_support, support_logps, token_logps
from erpd_lightning.objectives.divergences import Direction
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support import reference
from support.reference import grad

N, V, D = 7, 11, 5
# one token a chunk (also when not even one fits), 2 (rest 1), 3 (rest 1), 6 (rest 1), exactly all
CUTS = pytest.mark.parametrize("max_logits", [1, 11, 22, 35, 76, 77, 10**6])
HEADS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"bias": True, "scale": 2.5, "softcap": 4.0},
    ],
    ids=["plain", "bias", "scale", "softcap", "all"],
)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def some_head(bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> Head:
    return Head(
        weight=torch.randn(V, D, requires_grad=True),
        bias=torch.randn(V, requires_grad=True) if bias else None,
        scale=scale,
        softcap=softcap,
    )


def some_hidden(tokens: int = N) -> Tensor:
    return torch.randn(tokens, D, requires_grad=True)


def some_ids() -> Tensor:
    """Distinct entries, from none but one to three of them padding."""
    ids = torch.stack([torch.randperm(V)[:4] for _ in range(N)])
    for row in range(N):
        ids[row, 4 - row % 4 :] = -1
    return ids


def leaves(head: Head, hidden: Tensor) -> list[Tensor]:
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


def in_float64(head: Head, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same leaves in float64 and the log-probs of all the vocabulary at once."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves(head, hidden)]
    logits = exact[0] @ exact[1].T
    if head.bias is not None:
        logits = logits + exact[2]
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return exact, torch.log_softmax(logits, -1)


def reference_logits(head: Head, hidden: Tensor) -> np.ndarray:
    return reference.head_logits(hidden, head.weight, head.bias, head.scale, head.softcap)


def assert_same_gradients(result: Tensor, leaves: list[Tensor], expected: Tensor, exact: list[Tensor]) -> None:
    """Of a randomly weighted sum, so that no error cancels."""
    weights = torch.randn(result.shape)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, twin in zip(leaves, exact, strict=True):
        assert (grad(twin) != 0).any()
        torch.testing.assert_close(grad(leaf).double(), grad(twin), **CLOSE)


def as_logits(rows: list[list[float]]) -> tuple[Head, Tensor]:
    """A head and hidden states whose logits are the given numbers."""
    hidden = torch.tensor(rows, requires_grad=True)
    return Head(weight=torch.eye(hidden.shape[1], requires_grad=True)), hidden


# --- logits and Head.of ---------------------------------------------------------------------


@HEADS
def test_logits(options: dict[str, Any]) -> None:
    head, hidden = some_head(**options), some_hidden()
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    assert logits.detach().numpy() == pytest.approx(reference_logits(head, hidden), abs=1e-5)


def test_logits_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    # 1*3 + 2*4 = 11, 1*0 - 2*1 = -2; the bias comes before the scale, the scale before the cap
    assert Head(weight).logits(hidden).tolist() == [[11.0, -2.0]]
    assert Head(weight, torch.tensor([1.0, 0.0])).logits(hidden).tolist() == [[12.0, -2.0]]
    head = Head(weight, torch.tensor([1.0, 0.0]), scale=0.5)
    assert head.logits(hidden).tolist() == [[6.0, -1.0]]
    # 4 tanh(6/4) = 3.62059, 4 tanh(-1/4) = -0.97967
    head = Head(weight, torch.tensor([1.0, 0.0]), scale=0.5, softcap=4.0)
    assert head.logits(hidden)[0].tolist() == pytest.approx([3.6205930, -0.9796747], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    head = Head(weight=torch.randn(V, D, dtype=dtype), softcap=3.0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    assert head.logits(hidden).dtype == torch.float32
    stats = token_logps(head, hidden, torch.zeros(N, dtype=torch.long), max_logits=2 * V)
    assert stats.logps.dtype == stats.entropy.dtype == torch.float32
    stats.logps.sum().backward()
    assert grad(hidden).dtype == dtype


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"final_logit_softcapping": None}, 1.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"logits_scaling": 8.0}, 0.125, None),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_of_reads_the_model(config: dict[str, Any], scale: float, softcap: float | None, bias: bool) -> None:
    linear = nn.Linear(D, V, bias=bias)
    model = SimpleNamespace(config=SimpleNamespace(**config), get_output_embeddings=lambda: linear)
    head = Head.of(model)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert head.scale == scale
    assert head.softcap == softcap


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 1.5}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_of_gives_the_logits_of_transformers(family: str, extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, initializer_range=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **extra,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(0, 17, (2, 3))
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.get_decoder()(ids).last_hidden_state
        logits = Head.of(model).logits(hidden.flatten(0, 1))
        plain = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    torch.testing.assert_close(logits, expected.flatten(0, 1), **CLOSE)
    if "tie_word_embeddings" not in extra:
        assert not torch.allclose(plain, expected, atol=1e-2)


# --- token_logps ----------------------------------------------------------------------------


def test_token_logps_by_hand() -> None:
    # probabilities 1/2, 1/4, 1/4: the logits ln 2, 0, 0
    head, hidden = as_logits([[np.log(2.0), 0.0, 0.0]] * 2)
    stats = token_logps(head, hidden, torch.tensor([0, 2]))
    assert stats.logps.tolist() == pytest.approx([-0.69314718, -1.38629436], abs=1e-6)
    assert stats.entropy.tolist() == pytest.approx([1.03972077] * 2, abs=1e-6)  # 1.5 ln 2


@HEADS
@CUTS
def test_token_logps_agree_with_full_logits(max_logits: int, options: dict[str, Any]) -> None:
    head, hidden = some_head(**options), some_hidden()
    targets = torch.randint(0, V, (N,))
    stats = token_logps(head, hidden, targets, max_logits=max_logits)

    logp = reference.log_softmax(reference_logits(head, hidden))
    assert stats.logps.dtype == stats.entropy.dtype == torch.float32
    assert stats.logps.tolist() == pytest.approx([logp[n, targets[n]] for n in range(N)], abs=1e-5)
    assert stats.entropy.numpy() == pytest.approx(reference.entropy(logp), abs=1e-5)
    assert not stats.entropy.requires_grad

    exact, full = in_float64(head, hidden)
    assert_same_gradients(stats.logps, leaves(head, hidden), full[torch.arange(N), targets], exact)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@CUTS
def test_token_logps_with_only_some_leaves_trained(max_logits: int, trained: str) -> None:
    head, hidden = some_head(), some_hidden()
    leaf, frozen = (hidden, head.weight) if trained == "hidden" else (head.weight, hidden)
    frozen.requires_grad_(False)
    targets = torch.randint(0, V, (N,))
    exact, full = in_float64(head, hidden)
    twin = exact[0] if trained == "hidden" else exact[1]
    stats = token_logps(head, hidden, targets, max_logits=max_logits)
    assert_same_gradients(stats.logps, [leaf], full[torch.arange(N), targets], [twin])
    assert frozen.grad is None


@CUTS
def test_token_logps_without_autograd(max_logits: int) -> None:
    head, hidden = some_head(), some_hidden()
    targets = torch.randint(0, V, (N,))
    with torch.no_grad():
        stats = token_logps(head, hidden, targets, max_logits=max_logits)
    assert not stats.logps.requires_grad
    _, full = in_float64(head, hidden)
    torch.testing.assert_close(stats.logps.double(), full[torch.arange(N), targets].detach(), **CLOSE)


@pytest.mark.parametrize("max_logits", [3, 10**6])
def test_token_logps_of_extreme_logits_stay_finite(max_logits: int) -> None:
    head, hidden = as_logits([[1e4, -1e4, 0.0], [0.0, 1e4, 1e4], [-1e4, -1e4, -1e4]])
    stats = token_logps(head, hidden, torch.tensor([1, 0, 2]), max_logits=max_logits)
    assert stats.logps.tolist() == pytest.approx([-2e4, -1e4 - np.log(2), -np.log(3)], rel=1e-6)
    assert stats.entropy.tolist() == pytest.approx([0.0, np.log(2), np.log(3)], abs=1e-6)
    stats.logps.sum().backward()
    assert torch.isfinite(grad(hidden)).all()
    assert torch.isfinite(grad(head.weight)).all()


# --- select_support -------------------------------------------------------------------------


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
        use_token_logps(some_head(), some_hidden(), N * V)
        assert saved  # the hook works


def test_select_support_has_no_gradient_and_survives_extremes() -> None:
    head, hidden = as_logits([[1e4, -1e4, 0.0], [1e4, 1e4, 0.0]])
    ids = select_support(head, hidden)
    assert not ids.requires_grad
    assert [sorted(row) for row in chosen(ids)] == [[0], [0, 1]]


# --- support_logps --------------------------------------------------------------------------


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


# --- divergence -----------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    head, p = as_logits([[0.0, 0.0]])
    _, q = as_logits([[0.0, float(np.log(3.0))]])
    result = divergence(head, p, head, q)
    assert result.kl.item() == pytest.approx(0.14384104, abs=1e-6)  # ln(4/3) / 2
    assert result.entropy.item() == pytest.approx(0.69314718, abs=1e-6)
    # the other direction: ln(1/2)/4 + 3 ln(3/2)/4
    assert divergence(head, q, head, p).kl.item() == pytest.approx(0.13081204, abs=1e-6)


@HEADS
@CUTS
def test_divergence_agrees_with_exact_sums(max_logits: int, options: dict[str, Any]) -> None:
    head_p, hidden_p = some_head(**options), some_hidden()
    head_q, hidden_q = some_head(), torch.randn(N, 3, requires_grad=True)
    head_q.weight = torch.randn(V, 3, requires_grad=True)  # another width
    result = divergence(head_p, hidden_p, head_q, hidden_q, max_logits=max_logits)

    logp = reference.log_softmax(reference_logits(head_p, hidden_p))
    logq = reference.log_softmax(reference_logits(head_q, hidden_q))
    assert result.kl.detach().numpy() == pytest.approx(reference.kl(logp, logq), abs=1e-5)
    assert result.entropy.numpy() == pytest.approx(reference.entropy(logp), abs=1e-5)
    assert not result.entropy.requires_grad

    exact, full = in_float64(head_p, hidden_p)
    expected = (full.exp() * (full - torch.tensor(logq))).sum(-1)
    assert_same_gradients(result.kl, leaves(head_p, hidden_p), expected, exact)
    assert hidden_q.grad is None
    assert head_q.weight.grad is None


@CUTS
def test_divergence_in_the_forward_direction(max_logits: int) -> None:
    """p and q exchanged, the gradient and the entropy still those of p."""
    head_p, hidden_p = some_head(), some_hidden()
    head_q, hidden_q = some_head(), torch.randn(N, 3, requires_grad=True)
    head_q.weight = torch.randn(V, 3, requires_grad=True)
    result = divergence(head_p, hidden_p, head_q, hidden_q, direction="forward", max_logits=max_logits)
    logp = reference.log_softmax(reference_logits(head_p, hidden_p))
    logq = reference.log_softmax(reference_logits(head_q, hidden_q))
    assert result.kl.detach().numpy() == pytest.approx(reference.kl(logq, logp), abs=1e-5)
    assert result.entropy.numpy() == pytest.approx(reference.entropy(logp), abs=1e-5)
    exact, full = in_float64(head_p, hidden_p)
    other = torch.tensor(logq)
    assert_same_gradients(result.kl, leaves(head_p, hidden_p), (other.exp() * (other - full)).sum(-1), exact)
    assert hidden_q.grad is None
    assert head_q.weight.grad is None


@pytest.mark.parametrize("max_logits", [3, 10**6])
def test_divergence_of_extreme_logits_stays_finite(max_logits: int) -> None:
    head, p = as_logits([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    _, q = as_logits([[0.0, 0.0, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, -1e4]])
    result = divergence(head, p, head, q, max_logits=max_logits)
    # ln 3; 0 - -2e4; each third: -ln 3 + ln 2, twice, and -ln 3 + 1e4 + ln 2
    expected = [np.log(3), 2e4, -np.log(3) + np.log(2) + 1e4 / 3]
    assert result.kl.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.entropy.tolist() == pytest.approx([0.0, 0.0, np.log(3)], abs=1e-6)
    result.kl.sum().backward()
    assert torch.isfinite(grad(p)).all()
    assert torch.isfinite(grad(head.weight)).all()


@CUTS
def test_divergence_of_a_policy_from_itself_is_zero(max_logits: int) -> None:
    head, hidden = some_head(), some_hidden()
    result = divergence(head, hidden, head, hidden, max_logits=max_logits)
    assert result.kl.tolist() == pytest.approx([0.0] * N, abs=1e-6)
    result.kl.sum().backward()
    assert grad(hidden).abs().max() < 1e-6


# --- the bound on memory --------------------------------------------------------------------

Use = Callable[[Head, Tensor, int], Tensor | None]
Differentiable = Callable[[Head, Tensor, int], Tensor]


def use_token_logps(head: Head, hidden: Tensor, max_logits: int) -> Tensor:
    targets = torch.arange(len(hidden)) % len(head.weight)
    return token_logps(head, hidden, targets, max_logits=max_logits).logps


def use_select_support(head: Head, hidden: Tensor, max_logits: int) -> None:
    select_support(head, hidden, max_logits=max_logits)


def use_support_logps(head: Head, hidden: Tensor, max_logits: int) -> Tensor:
    ids = torch.arange(len(hidden))[:, None] + torch.arange(3)
    return support_logps(head, hidden, ids % len(head.weight), max_logits=max_logits)


def use_divergence(head: Head, hidden: Tensor, max_logits: int, direction: Direction = "reverse") -> Tensor:
    size, dtype = head.weight.numel(), head.weight.dtype
    other = Head(weight=torch.linspace(-1, 1, size, dtype=dtype).view_as(head.weight))
    states = torch.ones_like(hidden)
    return divergence(head, hidden, other, states, direction=direction, max_logits=max_logits).kl


def use_forward_divergence(head: Head, hidden: Tensor, max_logits: int) -> Tensor:
    return use_divergence(head, hidden, max_logits, "forward")


DIVERGENCES = (use_divergence, use_forward_divergence)


DIFFERENTIABLE: list[Differentiable] = [use_token_logps, use_support_logps, use_divergence, use_forward_divergence]


def use_everything_at_once(head: Head, hidden: Tensor, max_logits: int) -> Tensor:
    return torch.log_softmax(head.logits(hidden), -1)[:, 0]


def use_chunks_that_are_kept(head: Head, hidden: Tensor, max_logits: int) -> Tensor:
    chunks = hidden.split(max(1, max_logits // len(head.weight)))
    return torch.cat([torch.log_softmax(head.logits(chunk), -1)[:, 0] for chunk in chunks])


class Meter(TorchDispatchMode):
    """Numbers of elements: of the largest output of any operation, and of all alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self.calls: Counter[str] = Counter()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = StorageWeakRef(tensor.untyped_storage())
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._alive[storage.cdata] = (storage, size)
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    @property
    def products(self) -> int:
        """Matrix products, forward and backward."""
        return sum(self.calls[name] for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"))


@contextmanager
def metered() -> Iterator[Meter]:
    with Meter() as meter:
        yield meter


LARGE_V, SMALL_D, TOKENS = 150_000, 2, 12


def measure(use: Use, tokens: int) -> Meter:
    head = Head(weight=torch.randn(LARGE_V, SMALL_D, requires_grad=True))
    hidden = torch.randn(tokens, SMALL_D, requires_grad=True)
    with metered() as meter:
        result = use(head, hidden, LARGE_V)  # one token a chunk
        if result is not None:
            result.sum().backward()
    if result is not None:
        assert grad(head.weight).shape == head.weight.shape
    return meter


@pytest.mark.parametrize("use", [*DIFFERENTIABLE, use_select_support])
def test_memory_is_bounded_whatever_the_number_of_tokens(use: Use) -> None:
    few, many = measure(use, TOKENS), measure(use, 2 * TOKENS)
    limit = max(LARGE_V * SMALL_D, 2 * LARGE_V)
    assert few.largest <= limit
    assert many.largest <= limit
    # nor is it bounded by cutting and then keeping all the pieces
    assert many.peak - few.peak < LARGE_V / 4
    assert many.peak < 4 * LARGE_V * SMALL_D + 10 * LARGE_V


def test_the_meter_sees_what_it_should() -> None:
    once = measure(use_everything_at_once, TOKENS)
    assert once.largest == TOKENS * LARGE_V
    few, many = (measure(use_chunks_that_are_kept, n) for n in (TOKENS, 2 * TOKENS))
    assert few.largest == many.largest == LARGE_V * SMALL_D
    assert many.peak - few.peak >= TOKENS * LARGE_V


@pytest.mark.parametrize("use", DIFFERENTIABLE)
@pytest.mark.parametrize("max_logits", [2 * V, N * V])
def test_gradcheck_in_float64(use: Differentiable, max_logits: int) -> None:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return use(Head(weight, bias, scale=0.7, softcap=3.0), hidden, max_logits)

    shapes = [(N, D), (V, D), (V,)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("use", DIFFERENTIABLE)
def test_chunks_are_recomputed_only_if_there_are_several(use: Differentiable) -> None:
    """Matrix products: one forward (two with another policy's), two backward, one recomputed."""
    forward = 2 if use in DIVERGENCES else 1
    for max_logits, pieces in [(N * V, 1), (N * V - 1, 2), (2 * V, 4), (1, N)]:
        with metered() as meter:
            use(some_head(), some_hidden(), max_logits).sum().backward()
        recomputed = forward if pieces > 1 else 0
        assert meter.products == pieces * (forward + 2 + recomputed)


@pytest.mark.parametrize("use", [*DIFFERENTIABLE, use_select_support])
@pytest.mark.parametrize(("max_logits", "pieces"), [(1, 7), (V, 7), (2 * V, 4), (3 * V + 2, 3), (7 * V, 1)])
def test_chunks_without_autograd(use: Use, max_logits: int, pieces: int) -> None:
    head, hidden = some_head(), some_hidden()
    with torch.no_grad(), metered() as meter:
        use(head, hidden, max_logits)
    assert meter.products == pieces * (2 if use in DIVERGENCES else 1)


def test_chunks_hold_32_million_logits_by_default() -> None:
    assert MAX_LOGITS == 2**25
    for function in (token_logps, select_support, support_logps, divergence):
        assert inspect.signature(function).parameters["max_logits"].default == MAX_LOGITS


# --- no tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("use", DIFFERENTIABLE)
@pytest.mark.parametrize("bias", [False, True])
def test_no_tokens_still_run_backward(use: Differentiable, bias: bool) -> None:
    head, hidden = some_head(bias=bias), some_hidden(0)
    result = use(head, hidden, 10**6)
    assert result.shape[0] == 0
    result.sum().backward()
    assert grad(hidden).shape == (0, D)
    for parameter in leaves(head, hidden)[1:]:
        assert parameter.grad is None or (parameter.grad == 0).all()


def test_no_tokens_have_empty_results() -> None:
    head, hidden = some_head(), some_hidden(0)
    targets = torch.zeros(0, dtype=torch.long)
    assert token_logps(head, hidden, targets).entropy.shape == (0,)
    assert divergence(head, hidden, head, hidden).entropy.shape == (0,)
    ids = select_support(head, hidden)
    assert ids.shape == (0, 1)
    assert ids.dtype == torch.long
    assert support_logps(head, hidden, ids).shape == (0, 2)
