"""SwiGLU's MLP: against FP64, its casts, and what it keeps for its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.live_memory import TrackStorages
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers.linear import attach_main_grads, quantize_weights
from fp8moe.layers.mlp import Mlp, swiglu
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.layers.recompute import kept
from tests.distance import calc_diff

T, D = 48, 64
NOTHING: frozenset[Recompute] = frozenset()
BOUND = {Precision.FP32: 1e-10, Precision.BF16: 2e-4, Precision.FP8: 4e-3}


def build(recipe: Recipe, hidden: int = D) -> Mlp:
    torch.manual_seed(0)
    mlp = Mlp(D, hidden, recipe)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    attach_main_grads(mlp)
    quantize_weights(mlp)
    return mlp


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglus_columns_kept_and_again_are_the_same_bits(precision: Precision, weighted: bool) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(T, 2 * D).to(precision.dtype)
    weights = torch.rand(T) if weighted else None
    found = []
    for names in (NOTHING, frozenset({Recompute.SWIGLU})):
        hidden, _ = swiglu(Recipe(precision, names)).forward(gate_up, weights)
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
        mlp = build(Recipe(precision, names))
        with TrackStorages() as tracked:
            y = mlp(kept(x))
        hidden = 0 if names or precision is Precision.FP8 else T * D * wide
        assert tracked.live_bytes() == cached + hidden + y.untyped_storage().nbytes()


@pytest.mark.parametrize("precision", list(Precision))
def test_output_and_gradients_against_fp64(precision: Precision) -> None:
    """Gate first, up second; a gradient as small as a mean over many tokens makes it."""
    mlp = build(Recipe(precision), hidden=96)
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    dy = torch.randn(T, D).to(precision.dtype) * 2**-30
    mlp(x).backward(dy)
    x64 = x.detach().double().requires_grad_()
    w1, w2 = (p.detach().double().requires_grad_() for p in (mlp.gate_up.weight, mlp.down.weight))
    gate, up = (x64 @ w1.T).split(96, -1)
    expected = (gate * gate.sigmoid() * up) @ w2.T
    expected.backward(dy.double())
    ones, bound = torch.ones, BOUND[precision]
    weights = [(linear.weight.main_grad, w.grad) for linear, w in ((mlp.gate_up, w1), (mlp.down, w2))]
    pairs: list[tuple[Any, Any]] = [(mlp(x).detach(), expected.detach()), (x.grad, x64.grad), *weights]
    for got, want in pairs:
        assert calc_diff(got, want, ones(len(got), 1), ones(got.shape[1], 1)) <= bound


def is_power_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale).mantissa == 0.5).all())


def test_its_input_is_cast_with_power_of_two_scales_in_rows_and_columns() -> None:
    """Shared experts take the cast that is dispatched; columns made of other rows would be rounded twice."""
    x = torch.randn(128, D).bfloat16()
    cast = build(Recipe(Precision.FP8)).cast(x)
    rows, columns = cast.operand.rows, cast.operand.columns()
    assert isinstance(rows, Fp8Tensor) and isinstance(columns, Fp8Tensor)
    assert is_power_of_two(rows.scale) and is_power_of_two(columns.scale)
    assert cast.autograd_handle is x and rows.shape == (128, D) and columns.shape == (D, 128)
    assert calc_diff(rows.dequantize(), x) < 1e-3 and calc_diff(columns.dequantize(), x.T) < 1e-3


@pytest.mark.parametrize("precision", list(Precision))
def test_an_input_without_gradient_costs_no_product_and_weights_learn_all_the_same(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = build(Recipe(precision))
    x, dy = torch.randn(T, D).to(precision.dtype), torch.randn(T, D).to(precision.dtype)
    mlp(x.clone().requires_grad_()).backward(dy)
    expected = [parameter.main_grad.clone() for parameter in mlp.parameters()]  # type: ignore[operator]
    for parameter in mlp.parameters():
        parameter.main_grad.zero_()  # type: ignore[operator]
    monkeypatch.setattr(mlp.gate_up, "dgrad", lambda *_: pytest.fail("nobody asks for this product"))
    wgrads = DeferredWgrads()
    with wgrads.collect():
        mlp(x).backward(dy)
    assert len(wgrads) == 2 and not any(p.main_grad.any() for p in mlp.parameters())  # type: ignore[operator]
    wgrads.run()
    assert all(torch.equal(p.main_grad, want) for p, want in zip(mlp.parameters(), expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_swiglu_by_its_formula_with_weights(precision: Precision) -> None:
    torch.manual_seed(0)
    gate_up, dy, weights = (
        torch.randn(T, 2 * D).to(precision.dtype),
        torch.randn(T, D).to(precision.dtype),
        torch.rand(T),
    )
    wide, factor = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = wide.split(D, -1)
    expected = gate * gate.sigmoid() * up * factor[:, None]
    expected.backward(dy.double())
    for names in (NOTHING, FULL_RECOMPUTE):
        act = swiglu(Recipe(precision, names))
        hidden, cached = act.forward(gate_up, weights)
        d_gate_up, d_weights = act.backward(dy, cached, weights)
        assert d_weights is not None and d_gate_up.columns() is d_gate_up.rows
        assert calc_diff(hidden.rows, expected.detach()) < 1e-5  # type: ignore[arg-type]
        assert calc_diff(d_gate_up.rows, wide.grad) < 1e-5 and calc_diff(d_weights, factor.grad) < 1e-12  # type: ignore[arg-type]
