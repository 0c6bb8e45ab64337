"""What autograd saves, captured and computed again: the same bits, when asked and no more often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.layers.recompute import SavedTensor, capture_saved, kept, recompute_saved

T, D = 48, 64


def test_views_come_back_as_they_were_computed_once_and_without_gradients() -> None:
    torch.manual_seed(0)
    x, constant, dy = torch.randn(3, T, T)
    x.requires_grad_()
    calls: list[bool] = []

    def make() -> tuple[Tensor, Tensor]:
        wide = torch.cat([x, x + 1, x * 2], dim=-1)
        return x * 3, wide[:, T:]  # a view that does not begin where its storage does

    def again() -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return make()

    def use(q: Tensor, k: Tensor) -> Tensor:
        return q.t() @ k[:, :T] + q * k[:, T:] + q * constant

    expected = use(*make())
    q, k = make()
    with capture_saved() as captured:
        out = use(q, k)
    recompute_saved(captured, (q, k), again)
    assert sum(saved.tensor is None for saved in captured) == 4
    (want,) = torch.autograd.grad(expected, x, dy)
    assert calls == []
    (got,) = torch.autograd.grad(out, x, dy, retain_graph=True)
    assert torch.equal(got, want) and calls == [False]
    (got,) = torch.autograd.grad(out, x, dy)
    assert torch.equal(got, want) and calls == [False, False]


def test_what_is_made_again_is_without_autograd_whoever_asks() -> None:
    x = torch.randn(T, D, requires_grad=True)
    with capture_saved() as captured:
        y = x * 1
        z = y * y
    recompute_saved(captured, [y], lambda: [x * 1])
    assert captured and not any(saved.unpack().requires_grad for saved in captured)
    z.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * x.detach())


def test_other_and_empty_tensors_are_left_alone() -> None:
    a, b, empty = torch.randn(T, D, requires_grad=True), torch.randn(T, D), torch.empty(0, D, requires_grad=True)
    with capture_saved() as captured:
        out = (a * b).sum() + (empty * torch.empty(0, D)).sum()
    recompute_saved(captured, (torch.randn(T, D), torch.empty(0)), lambda: pytest.fail("nothing of it was saved"))
    out.backward()
    assert a.grad is not None and torch.equal(a.grad, b)


def test_a_kept_tensor_recalls_its_values_without_autograd() -> None:
    x = torch.randn(T, D, requires_grad=True)
    recallable = kept(x)
    assert recallable.tensor is x and kept(recallable) is recallable
    values = recallable.recall()
    assert values.data_ptr() == x.data_ptr() and not values.requires_grad


def test_a_replaced_tensor_is_let_go_and_made_at_each_request() -> None:
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    x = torch.zeros(2)
    saved = SavedTensor(x)
    assert saved.unpack() is x
    saved.replace(make)
    assert saved.tensor is None and not calls
    assert torch.equal(saved.unpack(), torch.ones(2)) and torch.equal(saved.unpack(), torch.ones(2))
    assert len(calls) == 2
