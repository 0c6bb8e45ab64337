"""A Linear's three products against FP64, in every precision, and when its weight gradient is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.layers.linear import Linear, quantize_weights
from fp8moe.layers.operand import Fp8Gradient, stand_in
from fp8moe.layers.recipe import Precision
from fp8moe.layers.wgrad import WeightGradStore, attach_main_grads
from tests.distance import calc_diff

BOUND = {Precision.FP32: 1e-11, Precision.BF16: 1e-4, Precision.FP8: 1e-3}


def build(n_in: int, n_out: int, precision: Precision) -> Linear:
    torch.manual_seed(0)
    linear = Linear(n_in, n_out, precision=precision)
    with torch.no_grad():
        linear.weight.normal_(0, n_in**-0.5)
    attach_main_grads(linear)
    quantize_weights(linear)
    return linear


def tensors(linear: Linear, tokens: int) -> tuple[Tensor, Tensor]:
    n_out, n_in = linear.weight.shape
    dtype = linear.precision.dtype
    return torch.randn(tokens, n_in).to(dtype).requires_grad_(), torch.randn(tokens, n_out).to(dtype) * 2**-20


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("n_in, n_out, tokens", [(256, 128, 64), (2112, 576, 48), (16, 144, 160)])
def test_products_against_fp64(precision: Precision, n_in: int, n_out: int, tokens: int) -> None:
    linear = build(n_in, n_out, precision)
    x, dy = tensors(linear, tokens)
    y = linear(x)
    y.backward(dy)
    w64, x64, dy64 = linear.weight.detach().double(), x.detach().double(), dy.double()
    assert x.grad is not None
    assert linear.weight.grad is None
    bound = BOUND[precision]
    assert calc_diff(y.detach(), x64 @ w64.T, x64, w64) <= bound
    assert calc_diff(x.grad, dy64 @ w64, dy64, w64.T) <= bound
    assert calc_diff(linear.weight.main_grad, dy64.T @ x64, dy64.T, x64.T) <= bound  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", list(Precision))
def test_main_grad_accumulates_over_micro_batches(precision: Precision) -> None:
    linear = build(128, 64, precision)
    x, dy = tensors(linear, 32)
    linear(x).backward(dy)
    once = linear.weight.main_grad.clone()  # type: ignore[operator]
    linear(x).backward(dy)
    torch.testing.assert_close(linear.weight.main_grad, 2 * once)


def test_weights_are_quantized_when_told_and_not_before() -> None:
    linear = build(128, 64, Precision.FP8)
    x, _ = tensors(linear, 16)
    before = linear(x).detach()
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(linear(x), before)
    quantize_weights(linear)
    assert torch.equal(linear(x), 2 * before)


def test_an_unquantized_weight_is_refused() -> None:
    linear = Linear(128, 64, precision=Precision.FP8)
    with pytest.raises(AssertionError, match="quantize_weights"):
        linear(torch.zeros(16, 128, dtype=torch.bfloat16))


def test_weight_gradients_wait_in_the_store() -> None:
    linear = build(128, 64, Precision.FP8)
    x, dy = tensors(linear, 32)
    linear(x).backward(dy)
    at_once = linear.weight.main_grad.clone()  # type: ignore[operator]
    linear.weight.main_grad.zero_()  # type: ignore[operator]
    store = WeightGradStore()
    with store.collect(("stage", 0)):
        linear(x).backward(dy)
    assert not linear.weight.main_grad.any()  # type: ignore[operator]
    store.run(("stage", 1))
    assert len(store) == 1
    store.run(("stage", 0))
    assert torch.equal(linear.weight.main_grad, at_once)  # type: ignore[arg-type]


def test_a_stand_in_poisons_whoever_computes_with_it() -> None:
    edge = stand_in((3, 4), torch.zeros(1, dtype=torch.bfloat16))
    assert edge.untyped_storage().nbytes() == 2
    assert (edge + 1).isnan().all()
    box = Fp8Gradient()
    assert box.take() is None
