"""Recomputation part by part: the same bits, computed when asked and no more often, from what was to be kept alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kept import Made
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.mlp import Mlp, swiglu
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import activation, detached_handle
from fp8moe.layers.recipe import Precision
from fp8moe.layers.recompute import RECIPE, Recompute, capture_saved, recompute_saved, kept
from fp8moe.layers.router import Router, RouterConfig
from fp8moe.layers.wgrad import attach_main_grads

T, D = 48, 64
NOTHING: frozenset[Recompute] = frozenset()


def norms(precision: Precision) -> list[RMSNorm]:
    made = [RMSNorm(D, eps=1e-6, precision=precision, recompute=names) for names in (NOTHING, RECIPE)]
    for norm in made:
        torch.manual_seed(1)
        torch.nn.init.normal_(norm.weight)
    return made


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_norms_output_and_gradients_are_the_same_bits(precision: Precision) -> None:
    torch.manual_seed(0)
    x0, dy, other = torch.randn(3, T, D).to(precision.dtype)
    found = []
    for norm in norms(precision):
        x = x0.clone().requires_grad_()
        y = norm(x)
        # x has a second use, as in a residual stream: a third summand would be added in another order.
        torch.autograd.backward([y.tensor, x * 1.0], [dy, other])
        found.append([y.tensor.detach(), y.recall(), x.grad, norm.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    y, recalled, *_ = found[1]
    assert torch.equal(y, recalled) and y.data_ptr() != recalled.data_ptr()


@pytest.mark.parametrize("precision", list(Precision))
def test_a_recomputing_norm_keeps_its_input_alone(precision: Precision) -> None:
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    alive = []
    for norm in norms(precision):
        with Made() as made:
            y = norm(x)
            columns, edge = activation(y, precision).operand.columns, detached_handle(y.tensor)
            del y
        alive.append(made.alive())
        assert edge.isnan().all() and columns().shape in ((T, D), (D, T))
    assert alive[0] >= T * D * x.element_size() and alive[1] <= 8  # the NaN of the stand-in


def test_an_edge_passes_gradients_and_no_values() -> None:
    x, dy = torch.randn(2, T, D)
    x.requires_grad_()
    detached_handle(x).backward(dy)
    assert x.grad is not None and torch.equal(x.grad, dy)


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
    with capture_saved() as boxes:
        out = use(q, k)
    recompute_saved(boxes, (q, k), again)
    assert sum(box.saved is None for box in boxes) == 4
    (want,) = torch.autograd.grad(expected, x, dy)
    assert calls == []
    (got,) = torch.autograd.grad(out, x, dy, retain_graph=True)
    assert torch.equal(got, want) and calls == [False]
    (got,) = torch.autograd.grad(out, x, dy)
    assert torch.equal(got, want) and calls == [False, False]


def test_boxes_of_other_tensors_and_of_empty_ones_are_left_alone() -> None:
    a, b, empty = torch.randn(T, D, requires_grad=True), torch.randn(T, D), torch.empty(0, D, requires_grad=True)
    with capture_saved() as boxes:
        out = (a * b).sum() + (empty * torch.empty(0, D)).sum()
    recompute_saved(boxes, (torch.randn(T, D), torch.empty(0)), lambda: pytest.fail("nothing of it was saved"))
    out.backward()
    assert a.grad is not None and torch.equal(a.grad, b)


ROUTER = RouterConfig(
    num_experts=8, topk=2, num_groups=4, top_groups=2, score="sigmoid", normalize_topk=True, route_scale=2.5,
    force_balance=False,
)  # fmt: skip


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_the_router_keeps_no_wide_copies_and_has_the_gradients_of_a_plain_product(precision: Precision) -> None:
    torch.manual_seed(0)
    router = Router(D, ROUTER, precision=precision)
    torch.nn.init.normal_(router.weight, std=0.3)
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    with Made() as made:
        routing = router(x, 2)
    assert made.alive() < T * D * 2
    dy = torch.randn(T, 2)
    got = torch.autograd.grad(routing.topk_weights_TK, (x, router.weight), dy)

    scores = torch.nn.functional.linear(x.float(), router.weight.float()).sigmoid().gather(1, routing.topk_ids_TK)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) * 2.5
    expected = torch.autograd.grad(weights, (x, router.weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglus_columns_kept_and_again_are_the_same_bits(precision: Precision, weighted: bool) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(T, 2 * D).to(precision.dtype)
    weights = torch.rand(T) if weighted else None
    found = []
    for names in (NOTHING, frozenset({Recompute.SWIGLU})):
        hidden, _ = swiglu(precision, recompute=names).forward(gate_up, weights)
        columns = hidden.columns
        if precision is Precision.FP8:
            found.append(columns().dequantize())  # type: ignore[union-attr]
        else:
            rows, seen = hidden.rows, columns()
            assert torch.equal(rows, seen)  # type: ignore[arg-type]
            assert (rows is seen) is (names == NOTHING)
            found.append(seen)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("precision", list(Precision))
def test_what_an_mlp_keeps(precision: Precision) -> None:
    """Its input, gate and up; without recomputation SwiGLU's output too, but for FP8, which never keeps it."""
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    wide = x.element_size()
    cached = 2 * D * T + 2 * D // 128 * 4 * T if precision is Precision.FP8 else 2 * D * T * wide
    for names in (NOTHING, frozenset({Recompute.SWIGLU})):
        mlp = Mlp(D, D, precision=precision, recompute=names)
        torch.nn.init.normal_(mlp.gate_up.weight)
        attach_main_grads(mlp)
        quantize_weights(mlp)
        with Made() as made:
            y = mlp(kept(x))
        hidden = 0 if names or precision is Precision.FP8 else T * D * wide
        assert made.alive() == cached + hidden + y.untyped_storage().nbytes()
