"""Parameter counts and FLOPs against constants derived by hand, and against the modules on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import block_parameters, count_parameters, flops_per_token, mfu
from fp8moe.model.transformer import Transformer
from tests.model.hf_oracle import BASE
from tests.model.published import DSV2_LITE_16B, DSV3_671B
from tests.model.shapes import changed

# DeepSeek-V3 by hand, a layer at a time.
ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
EXPERT = 3 * 7168 * 2048
DENSE_LAYER = ATTENTION + 3 * 7168 * 18432 + 2 * 7168
MOE_LAYER = ATTENTION + 257 * EXPERT + 256 * 7168 + 2 * 7168
EMBEDDING = 129280 * 7168
V3_TOTAL = 3 * DENSE_LAYER + 58 * MOE_LAYER + 2 * EMBEDDING + 7168
V3_ACTIVE = 3 * DENSE_LAYER + 58 * (MOE_LAYER - 248 * EXPERT) + EMBEDDING + 7168
V3_MTP = MOE_LAYER + 2 * 7168 * 7168 + 3 * 7168


def test_v3_counts_are_the_published_ones() -> None:
    counts = count_parameters(DSV3_671B)
    assert (counts.total, counts.active, counts.mtp) == (V3_TOTAL, V3_ACTIVE, V3_MTP)
    assert counts.total == 671_026_404_352  # "671B"
    assert counts.active / 1e9 == pytest.approx(36.7, rel=0.003)  # 36.63 by hand, "36.7B" as published
    assert counts.mtp / 1e9 == pytest.approx(11.5, rel=0.01)  # 11.61 by hand: "11.5B" is the block without its join


def test_v3_flops_are_the_published_ones() -> None:
    scores_and_values = 61 * 4096 * 128 * (192 + 128)  # causal: half of 2 x 4096 keys
    assert flops_per_token(DSV3_671B, 4096) == pytest.approx(3 * (2 * V3_ACTIVE + scores_and_values))
    assert flops_per_token(DSV3_671B, 4096) / 1e9 == pytest.approx(250, rel=0.01)
    assert flops_per_token(DSV3_671B, 4096, causal=False) / 1e9 == pytest.approx(280, rel=0.01)
    assert mfu(DSV3_671B, 4096, 1542) == pytest.approx(0.389, abs=0.005)  # ISCA 2025 paper: 38.9 % causal


@pytest.mark.parametrize("config", [BASE, DSV2_LITE_16B, DSV3_671B], ids=["small", "dsv2_lite_16b", "dsv3_671b"])
def test_modules_hold_what_is_counted(config: ModelConfig) -> None:
    model = on_meta(config, config.experts.num_experts)
    counts = count_parameters(config)
    assert sum(p.numel() for p in model.parameters()) == counts.total + counts.mtp
    blocks = {i: sum(p.numel() for p in model.block(i).parameters()) for i in range(config.num_layers)}
    assert blocks == {i: block_parameters(config, i) for i in range(config.num_layers)}
    assert all(p.device.type == "meta" and p.main_grad.dtype is torch.float32 for p in model.parameters())


def test_a_stage_holds_its_layers_alone() -> None:
    one_of_64 = DSV3_671B.experts.num_experts // 64  # expert-parallel ranks
    stage = on_meta(DSV3_671B, one_of_64, layers=range(4, 8), embedding=False, head=False)
    assert list(stage.blocks) == ["4", "5", "6", "7"]
    held = 4 * (MOE_LAYER - 252 * EXPERT)
    assert sum(p.numel() for p in stage.parameters()) == held
    whole = on_meta(DSV3_671B, 256)
    assert set(dict(stage.named_parameters())) < set(dict(whole.named_parameters()))


@pytest.mark.parametrize("embedding, head", [(True, False), (False, True)])
def test_an_end_without_the_other_has_no_mtp_module(embedding: bool, head: bool) -> None:
    part = on_meta(changed(BASE, mtp_depth=1), 8, layers=[2, 0], embedding=embedding, head=head)
    assert list(part.blocks) == ["0", "2"] and part.mtp is None
    assert (part.embedding is None, part.norm is None, part.head is None) == (not embedding, not head, not head)


def on_meta(config: ModelConfig, num_experts: int, **part: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, Recipe(Precision.FP8), LocalDispatcher(num_experts), **part)
