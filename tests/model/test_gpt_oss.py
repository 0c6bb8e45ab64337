"""GPT-OSS against `transformers`: same weights, same logits, same gradients, in shapes unlike the released."""

from __future__ import annotations

import pytest

from fp8moe.layers.attention.yarn import YarnConfig
from tests.model.oracles.gpt_oss import gpt_oss_names, their_gpt_oss
from tests.model.shapes import changed, model_config
from tests.model.test_families import compare, ours_of

GPT_OSS = model_config(
    kind="gqa", vocab_size=96, dim=64, num_layers=3, num_dense_layers=0, num_heads=4, num_kv_heads=2, head_dim=16,
    rope_dim=16, rope_theta=150000.0, qkv_bias=True, o_bias=True, sinks=True, window=4, window_layers="even",
    yarn=YarnConfig(factor=8.0, original_max_seq_len=32, mscale_all=0.0, truncate=False), dense_hidden=64,
    expert_hidden=48, num_experts=8, topk=3, num_shared_experts=0, score="softmax_topk", gate_bias=True,
    activation="swiglu_clamped", swiglu_limit=0.4, bias=True, norm_eps=1e-5, init_std=0.05, max_seq_len=64,
)  # fmt: skip
CASES = {
    "base": GPT_OSS,
    "two of five experts, three heads": changed(GPT_OSS, num_experts=5, topk=2, num_heads=3, num_kv_heads=1),
    "windows of one, in odd layers": changed(GPT_OSS, window=1, window_layers="odd", num_kv_heads=4),
    "no yarn, a window beyond the sequence": changed(GPT_OSS, yarn=None, window=64, swiglu_limit=7.0),
    "whole pairs, all layers, all experts": changed(
        GPT_OSS, window_layers="all", topk=8, dim=80, expert_hidden=16, norm_eps=1e-3,
        yarn=YarnConfig(factor=4.0, original_max_seq_len=16, mscale_all=0.0),
    ),
    "five query heads a key": changed(GPT_OSS, num_heads=5, num_kv_heads=1, window=9, num_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gpt_oss_agrees_with_transformers(case: str) -> None:
    ours = ours_of(CASES[case])
    for name, values in ours.state_dict().items():
        if name.endswith("bias_E"):
            values.zero_()
        if name.endswith("sinks"):
            values.normal_()
    compare(ours, their_gpt_oss(CASES[case], ours.state_dict()), gpt_oss_names)
