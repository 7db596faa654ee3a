"""Logits, log-probs of tokens and divergences of an output head against full logits in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from erpd_lightning.models.head import Head, divergence, token_logps
from support import reference
from support.heads import (
    CLOSE,
    CUTS,
    HEADS,
    D,
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

# Logits and `Head.of`


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
    text = SimpleNamespace(**config)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), get_output_embeddings=lambda: linear)
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


# token_logps


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


# divergence


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
