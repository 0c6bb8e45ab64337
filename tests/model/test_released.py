"""Released models: what configs/model says of them holds as many parameters as were released, on the meta device."""

from __future__ import annotations

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.flops import block_parameters, count_parameters
from fp8moe.model.memory import stage_parameters
from fp8moe.model.partition import partition
from fp8moe.model.transformer import Transformer

BILLIONS = {  # without MTP, as the released files hold them
    "moonlight_16b": 15.960,
    "dsv2_lite_16b": 15.706,
    "qwen3_30b_a3b": 30.532,
    "glm45_air": 106.852,
    "olmoe_7b": 6.919,
    "gpt_oss_20b": 20.915,
    "kimi_k2": 1026.408,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_are_those_released_and_those_counted(name: str) -> None:
    config = compose([f"model={name}"]).config.model
    with torch.device("meta"):
        model = Transformer(config, Recipe(Precision.BF16), LocalDispatcher(config.experts.num_experts))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    counts = count_parameters(config)
    assert (sum(sizes.values()) - mtp, mtp) == (counts.total, counts.mtp)
    assert round(counts.total / 1e9, 3) == BILLIONS[name]
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        held = sum(size for name, size in sizes.items() if name.startswith(prefix))
        assert held == block_parameters(config, layer)
    assert sum(stage_parameters(config, stage) for stage in partition(config, 4)) == counts.total + counts.mtp
