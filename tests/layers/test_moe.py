"""The mixture of experts against the same mathematics written as a loop in FP64 under ordinary autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.moe import MoE
from fp8moe.layers.recipe import Precision
from fp8moe.layers.router import RouterConfig
from fp8moe.layers.wgrad import attach_main_grads
from tests.distance import calc_diff

D, F, T = 128, 64, 96
CONFIG = RouterConfig(
    num_experts=8, topk=3, num_groups=4, top_groups=2, score="sigmoid", normalize_topk=True, route_scale=2.5,
    force_balance=False,
)  # fmt: skip
BOUND = {Precision.FP32: 1e-10, Precision.BF16: 2e-4, Precision.FP8: 4e-3}


def build(precision: Precision, config: RouterConfig = CONFIG, shared: int = 1) -> MoE:
    torch.manual_seed(0)
    moe = MoE(
        D, F, config, num_shared_experts=shared, dispatcher=LocalDispatcher(config.num_experts), precision=precision
    )
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.1)
    attach_main_grads(moe)
    quantize_weights(moe)
    return moe


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
    y, routing = moe(x, num_sequences=2)
    y.backward(dy)

    p = {name: w.detach().double().requires_grad_() for name, w in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = by_loop(moe, x64, routing.topk_ids_TK, p)
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
    y, routing = moe(x, num_sequences=1)
    y.sum().backward()
    assert (routing.topk_ids_TK == 5).all()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    touched = moe.experts.down.weight.main_grad.flatten(1).any(1)  # type: ignore[operator]
    assert touched.tolist() == [e == 5 for e in range(8)]


def test_forced_balance_gives_every_expert_the_same() -> None:
    moe = build(Precision.FP32, replace(CONFIG, force_balance=True))
    moe(torch.randn(64, D), num_sequences=1)
    assert moe.router.counts_E.tolist() == [24] * 8
