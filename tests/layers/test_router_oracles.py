"""The routers of `transformers`: the same weights choose the same experts, with the same weights and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig

DIM = 32


def v3(config: Any) -> RouterConfig:
    return RouterConfig(topk=3, num_groups=4, top_groups=2, route_scale=config.routed_scaling_factor)


def v2(config: Any) -> RouterConfig:
    scale = config.routed_scaling_factor
    groups = {"num_groups": 4, "top_groups": 2, "group_score": "max"}
    return RouterConfig(topk=3, score="softmax", normalize_topk=False, route_scale=scale, **groups)


ORACLES: dict[str, tuple[str, dict[str, Any], Callable[[Any], RouterConfig]]] = {
    "deepseek_v3.DeepseekV3": ("TopkRouter", {"num_local_experts": 16, "n_group": 4, "topk_group": 2}, v3),
    "deepseek_v2.DeepseekV2": (
        "TopkRouter",
        {"num_experts": 16, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        v2,
    ),
    "qwen3_moe.Qwen3Moe": (
        "TopKRouter",
        {"num_experts": 16, "norm_topk_prob": True},
        lambda config: RouterConfig(topk=3, score="softmax"),
    ),
    "gpt_oss.GptOss": (
        "TopKRouter",
        {"num_local_experts": 16},
        lambda config: RouterConfig(topk=3, score="softmax_topk"),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_it_routes_as_transformers_does(name: str) -> None:
    module, family = name.split(".")
    kind, settings, configured = ORACLES[name]
    models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    config = getattr(models, f"{family}Config")(hidden_size=DIM, num_experts_per_tok=3, **settings)
    theirs = getattr(models, f"{family}{kind}")(config)
    router = Router(DIM, 16, configured(config), Recipe(Precision.FP32))
    attach_main_grads(router)
    torch.nn.init.normal_(router.weight, std=0.3)
    theirs.weight.data.copy_(router.weight.data)
    if family == "DeepseekV3":
        theirs.e_score_correction_bias.copy_(router.bias_E.normal_(std=0.1))
    ours_x = torch.randn(30, DIM).requires_grad_()
    theirs_x = ours_x.detach().clone().requires_grad_()
    routing, (_, weights, ids) = router(ours_x, 1), theirs(theirs_x)
    order, theirs_order = routing.topk_ids_TK.argsort(1), ids.argsort(1)
    assert torch.equal(routing.topk_ids_TK.gather(1, order), ids.gather(1, theirs_order))
    ours_weights = routing.topk_weights_TK.gather(1, order)
    weights = weights.gather(1, theirs_order)
    torch.testing.assert_close(ours_weights, weights)
    dy = torch.randn(30, 3)
    ours_weights.backward(dy)
    weights.backward(dy)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    torch.testing.assert_close(router.weight.main_grad, theirs.weight.grad)
