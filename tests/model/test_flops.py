"""Parameter counts and FLOPs against constants derived by hand, and against the modules on the meta device."""

from __future__ import annotations

import pytest
import torch

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import count_parameters, flops_per_token, mfu
from fp8moe.model.transformer import Transformer
from tests.model.hf_oracle import BASE
from tests.model.published import DSV2_LITE_16B, DSV3_671B

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
    model = Transformer(config, precision=Precision.FP8, dispatcher=LocalDispatcher(config.num_experts), device="meta")
    counts = count_parameters(config)
    assert sum(p.numel() for p in model.parameters()) == counts.total + counts.mtp
    assert all(p.device.type == "meta" and p.main_grad.dtype is torch.float32 for p in model.parameters())


def test_a_stage_holds_its_layers_alone() -> None:
    local = LocalDispatcher(DSV3_671B.num_experts // 64)  # one of 64 expert-parallel ranks
    stage = Transformer(
        DSV3_671B,
        precision=Precision.FP8,
        dispatcher=local,
        layers=range(4, 8),
        embedding=False,
        head=False,
        device="meta",
    )
    assert list(stage.blocks) == ["4", "5", "6", "7"]
    held = 4 * (MOE_LAYER - 252 * EXPERT)
    assert sum(p.numel() for p in stage.parameters()) == held
    whole = Transformer(DSV3_671B, precision=Precision.FP8, dispatcher=LocalDispatcher(256), device="meta")
    assert set(dict(stage.named_parameters())) < set(dict(whole.named_parameters()))
