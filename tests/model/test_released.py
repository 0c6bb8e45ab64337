"""Released models: configs/model has the figures of their config.json and as many parameters, on the meta device.

The figures here are those of the released files, by the keys of `transformers`; its classes count beside ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from fp8moe.cli.compose import compose
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.flops import block_parameters, count_parameters
from fp8moe.model.memory import stage_parameters
from fp8moe.model.partition import partition
from fp8moe.model.transformer import Transformer
from tests.model.hf_oracle import hf_config
from tests.model.oracles.gpt_oss import gpt_oss
from tests.model.oracles.grouped import glm4_moe, olmoe, qwen3_moe
from tests.model.oracles.latent import deepseek_v2

LATENT = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# (billions of parameters without MTP, `transformers`' configuration of ours, its class, the released figures)
MODELS: dict[str, tuple[float, Any, Any, dict[str, Any]]] = {
    "moonlight_16b": (15.960, hf_config, DeepseekV3Config, LATENT | dict(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, q_lora_rank=None,
        routed_scaling_factor=2.446, n_group=1, topk_group=1, num_experts_per_tok=6, first_k_dense_replace=1,
        norm_topk_prob=True, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0})),
    "kimi_k2": (1026.408, hf_config, DeepseekV3Config, LATENT | dict(
        vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1, n_routed_experts=384, q_lora_rank=1536,
        routed_scaling_factor=2.827, n_group=1, topk_group=1, num_experts_per_tok=8, first_k_dense_replace=1,
        norm_topk_prob=True, rms_norm_eps=1e-6)),
    "dsv2_lite_16b": (15.706, deepseek_v2, DeepseekV2Config, LATENT | dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, n_shared_experts=2, n_routed_experts=64, q_lora_rank=None, routed_scaling_factor=1.0,
        topk_method="greedy", num_experts_per_tok=6, first_k_dense_replace=1, rms_norm_eps=1e-6)),
    "qwen3_30b_a3b": (30.532, qwen3_moe, Qwen3MoeConfig, dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=1e-6,
        max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})),
    "glm45_air": (106.852, glm4_moe, Glm4MoeConfig, dict(
        vocab_size=151552, hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=46,
        num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, use_qk_norm=False,
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, routed_scaling_factor=1.0, n_group=1,
        topk_group=1, first_k_dense_replace=1, norm_topk_prob=True, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5})),
    "olmoe_7b": (6.919, olmoe, OlmoeConfig, dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, attention_bias=False,
        clip_qkv=None, rms_norm_eps=1e-5, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "gpt_oss_20b": (20.915, gpt_oss, GptOssConfig, dict(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
        attention_bias=True, rms_norm_eps=1e-5, max_position_embeddings=131072)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_released_and_those_counted(name: str) -> None:
    billions, _, cls, released = MODELS[name]
    config = compose([f"model={name}"]).config.model
    with torch.device("meta"):
        model = Transformer(config, Recipe(Precision.BF16), LocalDispatcher(config.experts.num_experts))
        theirs = AutoModelForCausalLM.from_config(cls(**released, tie_word_embeddings=False))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in theirs.parameters()) and round(counts.total / 1e9, 3) == billions
    assert (sum(sizes.values()) - mtp, mtp) == (counts.total, counts.mtp)
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        held = sum(size for name, size in sizes.items() if name.startswith(prefix))
        assert held == block_parameters(config, layer)
    assert sum(stage_parameters(config, stage) for stage in partition(config, 4)) == counts.total + counts.mtp


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_the_released_ones(name: str) -> None:
    _, convert, _, released = MODELS[name]
    ours: AutoConfig = convert(compose([f"model={name}"]).config.model)
    assert {key: getattr(ours, key) for key in released} == released
