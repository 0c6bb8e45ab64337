"""Autograd enters a layer whose input needs no gradient by its weight, and visits no weight elsewhere; same sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import Linear, LinearPart, attach_main_grads, quantize_weights
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import ExpertsConfig, MoE
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import activation
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig

T, D = 32, 128
CONFIG = RouterConfig(topk=2)
Build = Callable[[Recipe], tuple[nn.Module, Callable[[Tensor], Tensor]]]


def linear(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = Linear(D, 64, recipe)
    return module, module


def part(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = Linear(D, 256, recipe)
    rows = LinearPart(module, slice(0, 128))
    return module, lambda x: rows(activation(x, recipe))


def mlp(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = Mlp(D, 64, recipe)
    return module, module


def norm(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = RMSNorm(D, recipe, eps=1e-6)
    return module, lambda x: module(x).tensor


def norm_of_a_sum(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = RMSNorm(D, recipe, eps=1e-6)
    return module, lambda x: module.with_residual(torch.ones_like(x), x)[1].tensor


def router(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = Router(D, 8, CONFIG, recipe)
    return module, lambda x: module(x, 1).topk_weights_TK


def moe(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = MoE(D, CONFIG, ExpertsConfig(num_experts=8, hidden=64), recipe, LocalDispatcher(8))
    return module, lambda x: module(module.route(x, 1))


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
@pytest.mark.parametrize("build", [linear, part, mlp, norm, norm_of_a_sum, router, moe])
def test_a_weight_is_visited_only_where_the_input_needs_no_gradient(build: Build, precision: Precision) -> None:
    torch.manual_seed(0)
    module, call = build(Recipe(precision))
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.1)
    attach_main_grads(module)
    quantize_weights(module)
    visited: list[Tensor] = []
    for weight in module.parameters():
        weight.register_post_accumulate_grad_hook(visited.append)
    values, gradients = torch.randn(T, D).to(precision.dtype), []
    for needed in (False, True):
        visited.clear()
        x = values.clone().requires_grad_(needed)
        y = call(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        gradients.append([weight.main_grad.clone() for weight in module.parameters()])
        assert all(bool(one.any()) for one in gradients[-1]) and all(one.grad is None for one in module.parameters())
        assert bool(visited) is not needed and (x.grad is not None) is needed
        for weight in module.parameters():
            weight.main_grad.zero_()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
