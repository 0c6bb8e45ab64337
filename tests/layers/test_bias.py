"""A bias: added in place, its gradient summed in FP32 over all tokens and micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8moe.layers.bias import add_bias, make_bias
from fp8moe.layers.linear import Linear, attach_main_grads, main_grad_of, quantize_weights
from fp8moe.layers.recipe import Precision, Recipe


@pytest.mark.parametrize("precision", list(Precision))
def test_a_biased_linear(precision: Precision) -> None:
    torch.manual_seed(0)
    recipe = Recipe(precision)
    linear = Linear(32, 48, recipe)
    nn.init.normal_(linear.weight)
    linear.bias = make_bias(48, recipe)
    assert linear.bias.dtype is recipe.dtype and linear.bias.initial_value == 0.0
    nn.init.normal_(linear.bias)
    attach_main_grads(linear)
    quantize_weights(linear)
    x = torch.randn(64, 32).to(recipe.dtype).requires_grad_()
    dy = torch.randn(64, 48).to(recipe.dtype)
    y = add_bias(linear(x), linear.bias)
    assert torch.equal(y, linear(x.detach()) + linear.bias)
    y.backward(dy)
    y = add_bias(linear(x), linear.bias)
    y.backward(dy)
    torch.testing.assert_close(main_grad_of(linear.bias), 2 * dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)
    assert linear.bias.grad is None and main_grad_of(linear.weight).any() and x.grad is not None


def test_thousands_of_small_gradients_are_not_lost_in_bf16() -> None:
    module = nn.Module()
    module.bias = make_bias(16, Recipe(Precision.BF16))
    nn.init.zeros_(module.bias)
    attach_main_grads(module)
    y = add_bias(torch.zeros(4096, 16, dtype=torch.bfloat16), module.bias)
    y.backward(torch.full((4096, 16), 1 / 256, dtype=torch.bfloat16))
    assert torch.equal(main_grad_of(module.bias), torch.full((16,), 16.0))
