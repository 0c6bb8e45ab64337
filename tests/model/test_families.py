"""Families of models against `transformers`: same weights, logits, gradients. DeepSeek-V3 is in test_transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.model.transformer import Transformer, init_weights
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE, YARN, hf_names, randomize
from tests.model.oracles.grouped import their_model, their_names
from tests.model.oracles.latent import their_v2
from tests.model.shapes import changed, model_config

V2 = changed(BASE, score="softmax", group_score="max", normalize_topk=False, route_scale=16.0)
QWEN3 = model_config(
    kind="gqa", vocab_size=96, dim=64, num_layers=3, num_dense_layers=0, num_heads=4, num_kv_heads=2, head_dim=32,
    rope_dim=32, rope_theta=1e6, qk_norm="head", dense_hidden=96, expert_hidden=48, num_experts=8, topk=3,
    num_shared_experts=0, score="softmax", init_std=0.05, max_seq_len=64,
)  # fmt: skip
GLM = changed(
    QWEN3, num_dense_layers=1, rope_dim=16, qk_norm="none", qkv_bias=True, score="sigmoid", num_shared_experts=1,
    norm_eps=1e-5,
)  # fmt: skip
OLMOE = changed(
    QWEN3, num_kv_heads=4, head_dim=16, rope_dim=16, rope_theta=1e4, qk_norm="full", normalize_topk=False, norm_eps=1e-5
)
LONG = YarnConfig(factor=4.0, original_max_seq_len=16, mscale_all=0.0)
LATENT = {
    "base": V2,
    "greedy": changed(V2, num_groups=1, top_groups=1, route_scale=1.0),
    "no query latent, two shared": changed(V2, q_lora_rank=0, num_shared_experts=2, topk=2),
    "three heads": changed(V2, dim=96, num_heads=3, nope_dim=32, v_dim=32),
    "eight groups": changed(V2, num_experts=16, num_groups=8, top_groups=3, topk=5),
    "yarn, two dense": changed(V2, yarn=YARN, num_dense_layers=2, norm_eps=1e-3),
}
GROUPED: dict[str, dict[str, tuple[ModelConfig, dict[str, Any]]]] = {
    "qwen3_moe": {
        "base": (QWEN3, {}),
        "mlp_only_layers": (changed(QWEN3, dense_layers=(1,)), {"mlp_only_layers": [1]}),
        "decoder_sparse_step": (changed(QWEN3, num_dense_layers=1, dense_layers=(2,)),
                                {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        "five heads": (changed(QWEN3, num_heads=5, num_kv_heads=5, head_dim=16, rope_dim=16), {}),
        "one key head, biases": (changed(QWEN3, num_kv_heads=1, qkv_bias=True, o_bias=True), {}),
        "not renormalised, all experts": (changed(QWEN3, normalize_topk=False, topk=8), {}),
        "yarn": (changed(QWEN3, yarn=LONG), {}),
    },
    "glm4_moe": {
        "base": (GLM, {}),
        "heads normed, no bias": (changed(GLM, qk_norm="head", qkv_bias=False), {}),
        "all rotated, nothing dense": (changed(GLM, rope_dim=32, num_dense_layers=0), {}),
        "a quarter rotated, three heads": (changed(GLM, num_heads=3, num_kv_heads=3, rope_dim=8), {}),
        "eight groups": (changed(GLM, num_experts=16, num_groups=8, top_groups=4, topk=8, route_scale=2.5), {}),
        "not renormalised, two shared": (changed(GLM, normalize_topk=False, num_shared_experts=2, num_kv_heads=1), {}),
    },
    "olmoe": {
        "base": (OLMOE, {}),
        "clipped": (changed(OLMOE, clip_qkv=0.7), {}),
        "grouped, clipped a little": (changed(OLMOE, num_kv_heads=2, clip_qkv=2.0), {}),
        "renormalised, biases": (changed(OLMOE, normalize_topk=True, qkv_bias=True, o_bias=True), {}),
        "three heads, one expert": (
            changed(OLMOE, dim=96, num_heads=3, num_kv_heads=3, head_dim=32, rope_dim=32, topk=1), {}
        ),
    },
}  # fmt: skip


def ours_of(c: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(c, Recipe(Precision.FP32), LocalDispatcher(c.experts.num_experts))
    init_weights(model, 0)
    randomize(model)
    if c.router.score == "softmax":  # these families have no bias in their choice
        for name, buffer in model.named_buffers():
            if name.endswith("bias_E"):
                buffer.zero_()
    return model


def test_biases_begin_at_zero_and_norms_at_one() -> None:
    config = changed(GLM, qk_norm="head", o_bias=True)
    model = Transformer(config, Recipe(Precision.BF16), LocalDispatcher(config.experts.num_experts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    init_weights(model, 0)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("_bias")}
    assert len(biases) == 6 and not any(p.any() for p in biases.values())
    gains = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(gains) == 13 and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)
    assert all(p.isfinite().all() for p in model.parameters())


def compare(ours: Transformer, theirs: Any, names_of: Any) -> None:
    config = ours.config
    batch = tokens(config.vocab_size)
    with torch.no_grad():
        expected = theirs(batch.inputs_BS).logits
        assert (ours.logits(batch.inputs_BS) - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 0.1, "the comparison would be blind"
    theirs.train()
    logits = theirs(batch.inputs_BS).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch.labels_BS.flatten()).backward()
    counts = LossCounts(*count_predicted(batch.labels_BS), sequences=2)
    total_loss(ours(batch), loss_weights(counts, mtp_weight=0.0, balance_alpha=0.0)).backward()
    grads = {name: p.main_grad for name, p in ours.named_parameters()}
    named = names_of(config, grads)
    assert set(named) == {name for name, _ in theirs.named_parameters()}
    for name, gradient in named.items():
        expected = theirs.get_parameter(name).grad
        assert expected is not None, name
        distance = (gradient - expected).norm() / expected.norm().clamp(min=1e-12)
        assert distance <= 1e-4, f"{name}: {distance:.2e}"


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, cases in GROUPED.items() for case in cases])
def test_grouped_families_agree_with_transformers(family: str, case: str) -> None:
    config, changes = GROUPED[family][case]
    ours = ours_of(config)
    compare(ours, their_model(family, config, ours.state_dict(), **changes), their_names)


@pytest.mark.parametrize("case", LATENT)
def test_deepseek_v2_agrees_with_transformers(case: str) -> None:
    ours = ours_of(LATENT[case])
    compare(ours, their_v2(LATENT[case], ours.state_dict()), hf_names)
