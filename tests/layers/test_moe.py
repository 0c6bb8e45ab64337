"""The mixture of experts against the same mathematics written as a loop in FP64 under ordinary autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import attach_main_grads, is_expert, quantize_weights
from fp8moe.layers.moe import ExpertsConfig, MoE
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import RouterConfig
from tests.distance import calc_diff

D, F, T = 128, 64, 96
CONFIG = RouterConfig(topk=3, num_groups=4, top_groups=2, route_scale=2.5)
EXPERTS = 8
BOUND = {Precision.FP32: 1e-10, Precision.BF16: 2e-4, Precision.FP8: 4e-3}


def build(precision: Precision, config: RouterConfig = CONFIG, shared: int = 1) -> MoE:
    torch.manual_seed(0)
    experts = ExpertsConfig(EXPERTS, F, num_shared=shared)
    moe = MoE(D, config, experts, Recipe(precision), LocalDispatcher(EXPERTS))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.1)
    attach_main_grads(moe)
    quantize_weights(moe)
    return moe


def call(moe: MoE, x: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Output and chosen experts of x, under ordinary autograd."""
    routed = moe.route(x, num_sequences)
    return moe(routed), routed.announced.topk_ids_TK


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (silu(gate) * up) @ down.T


def by_loop(moe: MoE, x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """FP64: every token through each of its chosen experts, weighted; plus the shared expert."""
    scores = (x @ p["router.weight"].T).sigmoid()
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * moe.router.config.route_scale
    rows = []
    for t in range(len(x)):
        parts = [
            weights[t, k] * mlp(x[t], p["experts.gate_up.weight"][e], p["experts.down.weight"][e])
            for k, e in enumerate(ids[t].tolist())
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows) + mlp(x, p["shared.gate_up.weight"], p["shared.down.weight"])


@pytest.mark.parametrize("precision", list(Precision))
def test_output_and_all_gradients(precision: Precision) -> None:
    moe = build(precision)
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    dy = torch.randn(T, D).to(precision.dtype) * 2**-34  # gradients of a mean over 63M tokens are near 1e-10
    y, ids = call(moe, x, num_sequences=2)
    y.backward(dy)

    p = {name: w.detach().double().requires_grad_() for name, w in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = by_loop(moe, x64, ids, p)
    expected.backward(dy.double())
    ones = torch.ones
    bound = BOUND[precision]
    assert calc_diff(y.detach(), expected.detach(), ones(T, 1), ones(D, 1)) <= bound
    assert calc_diff(x.grad, x64.grad, ones(T, 1), ones(D, 1)) <= bound
    for name, parameter in moe.named_parameters():
        got, want = parameter.main_grad.flatten(0, -2), p[name].grad.flatten(0, -2)  # type: ignore[union-attr]
        assert calc_diff(got, want, ones(len(got), 1), ones(got.shape[1], 1)) <= 2 * bound, name


@pytest.mark.parametrize("precision", list(Precision))
def test_one_expert_gets_all_and_the_rest_nothing(precision: Precision) -> None:
    moe = build(precision, replace(CONFIG, topk=1, num_groups=1, top_groups=1), shared=0)
    moe.router.bias_E[5] = 10.0
    x = torch.randn(32, D).to(precision.dtype).requires_grad_()
    y, ids = call(moe, x, num_sequences=1)
    y.sum().backward()
    assert (ids == 5).all()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    touched = moe.experts.down.weight.main_grad.flatten(1).any(1)  # type: ignore[operator]
    assert touched.tolist() == [e == 5 for e in range(8)]


def test_forced_balance_gives_every_expert_the_same() -> None:
    moe = build(Precision.FP32, replace(CONFIG, force_balance=True))
    call(moe, torch.randn(64, D), num_sequences=1)
    assert moe.router.counts_E.tolist() == [24] * 8


EXPERTS_CONFIG = ExpertsConfig(num_experts=4, hidden=48, num_shared=2)


@pytest.mark.parametrize("change, words", [
    ({"num_experts": 0}, r"^model\.experts\.num_experts=0 must be at least 1: use 1 or more$"),
    ({"hidden": 0}, r"^model\.experts\.hidden=0 must be at least 1: use 1 or more$"),
    ({"num_shared": -1}, r"model\.experts\.num_shared=-1 must be at least 0: use 0 for none"),
])  # fmt: skip
def test_impossible_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(EXPERTS_CONFIG, **change)


@pytest.mark.parametrize("num_shared", [0, 1, 2])
@pytest.mark.parametrize("here", [2, 4])
def test_parameters_are_those_of_the_built_layer(num_shared: int, here: int) -> None:
    config = replace(EXPERTS_CONFIG, num_shared=num_shared)
    moe = MoE(64, RouterConfig(topk=2), config, Recipe(Precision.FP32), LocalDispatcher(here))
    parameters = dict(moe.named_parameters())
    router = parameters.pop("router.weight")
    assert router.shape == (4, 64) and sum(p.numel() for p in parameters.values()) == config.num_parameters(64, here)
    assert {name for name, p in parameters.items() if is_expert(p)} == {"experts.gate_up.weight", "experts.down.weight"}
    assert (moe.shared is None) is (num_shared == 0)
