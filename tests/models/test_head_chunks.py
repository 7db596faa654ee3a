"""Chunks of tokens in which an output head is asked: the bound on memory, gradients, and no tokens at all."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erpd_lightning.models.head import MAX_LOGITS, Head, divergence, select_support, support_logps, token_logps
from erpd_lightning.objectives.divergences import Direction
from support.heads import (
    D,
    N,
    V,
    leaves,
    some_head,
    some_hidden,
)
from support.reference import grad

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
    # nor is it bounded by cutting and then keeping all the chunks
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
    for max_logits, chunks in [(N * V, 1), (N * V - 1, 2), (2 * V, 4), (1, N)]:
        with metered() as meter:
            use(some_head(), some_hidden(), max_logits).sum().backward()
        recomputed = forward if chunks > 1 else 0
        assert meter.products == chunks * (forward + 2 + recomputed)


@pytest.mark.parametrize("use", [*DIFFERENTIABLE, use_select_support])
@pytest.mark.parametrize(("max_logits", "chunks"), [(1, 7), (V, 7), (2 * V, 4), (3 * V + 2, 3), (7 * V, 1)])
def test_chunks_without_autograd(use: Use, max_logits: int, chunks: int) -> None:
    head, hidden = some_head(), some_hidden()
    with torch.no_grad(), metered() as meter:
        use(head, hidden, max_logits)
    assert meter.products == chunks * (2 if use in DIVERGENCES else 1)


def test_chunks_hold_32_million_logits_by_default() -> None:
    assert MAX_LOGITS == 2**25
    for function in (token_logps, select_support, support_logps, divergence):
        assert inspect.signature(function).parameters["max_logits"].default == MAX_LOGITS


# No tokens


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
