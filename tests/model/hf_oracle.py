"""The same weights in `transformers`' DeepSeek-V3 and in ours: the independent oracle of the architecture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.transformer import Transformer, init_weights
from tests.model.shapes import changed, model_config

BASE = model_config(
    vocab_size=96, dim=64, num_layers=3, num_dense_layers=1, num_heads=4, q_lora_rank=32, kv_lora_rank=32, nope_dim=16,
    rope_dim=16, v_dim=16, dense_hidden=96, expert_hidden=48, num_experts=8, topk=3, num_groups=4, top_groups=2,
    num_shared_experts=1, route_scale=2.5, init_std=0.05, max_seq_len=64,
)  # fmt: skip

YARN = YarnConfig(factor=4.0, original_max_seq_len=16, mscale=1.0, mscale_all=1.0)
AMPLIFIED = YarnConfig(factor=4.0, original_max_seq_len=16, mscale=0.707, mscale_all=1.4)
CASES = {
    "base": BASE,
    "no query latent": changed(BASE, q_lora_rank=0),
    "one group": changed(BASE, num_groups=1, top_groups=1),
    "eight groups": changed(BASE, num_experts=16, num_groups=8, top_groups=4, topk=8),
    "yarn": changed(BASE, yarn=YARN),
    "yarn of Kimi-K2, a step": changed(BASE, yarn=replace(YARN, beta_fast=1.0)),
    "eps of latents apart": changed(BASE, norm_eps=1e-2),
    "yarn with amplitude": changed(BASE, yarn=AMPLIFIED),
    "three heads": changed(BASE, num_heads=3, nope_dim=32, rope_dim=16, v_dim=16),
    "dense first, two shared": changed(BASE, num_dense_layers=2, num_shared_experts=2),
    "weights not normalised": changed(BASE, normalize_topk=False, route_scale=1.0),
}


def hf_config(c: ModelConfig) -> DeepseekV3Config:
    a, r, e = c.attention, c.router, c.experts
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.yarn:
        y = a.yarn
        rope |= {"rope_type": "yarn", "factor": y.factor, "beta_fast": y.beta_fast, "beta_slow": y.beta_slow,
                 "original_max_position_embeddings": y.original_max_seq_len, "mscale": y.mscale,
                 "mscale_all_dim": y.mscale_all}  # fmt: skip
    return DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.dense_hidden,
        moe_intermediate_size=e.hidden, num_hidden_layers=c.num_layers, num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_heads, n_shared_experts=e.num_shared, n_routed_experts=e.num_experts,
        routed_scaling_factor=r.route_scale, kv_lora_rank=a.kv_lora_rank, q_lora_rank=a.q_lora_rank or None,
        qk_rope_head_dim=a.rope_dim, v_head_dim=a.v_dim, qk_nope_head_dim=a.nope_dim, n_group=r.num_groups,
        topk_group=r.top_groups, num_experts_per_tok=r.topk, first_k_dense_replace=c.num_dense_layers,
        norm_topk_prob=r.normalize_topk, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        rope_parameters=rope, rope_interleave=True, attention_bias=False, tie_word_embeddings=False,
        attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip


def hf_names(c: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients), and the router's bias, under the names of `transformers`."""
    out = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    a = c.attention
    queries = a.q_lora_rank or a.num_heads * (a.nope_dim + a.rope_dim)
    for i in range(c.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q_a, kv_a = state[ours + "attn.qkv_a.weight"].split([queries, a.kv_lora_rank + a.rope_dim])
        out[theirs + ("self_attn.q_a_proj.weight" if a.q_lora_rank else "self_attn.q_proj.weight")] = q_a
        out[theirs + "self_attn.kv_a_proj_with_mqa.weight"] = kv_a
        pairs = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
                 "attn.kv_b": "self_attn.kv_b_proj", "attn.kv_norm": "self_attn.kv_a_layernorm",
                 "attn.o": "self_attn.o_proj"}  # fmt: skip
        if a.q_lora_rank:
            pairs |= {"attn.q_b": "self_attn.q_b_proj", "attn.q_norm": "self_attn.q_a_layernorm"}
        for mine, other in pairs.items():
            out[f"{theirs}{other}.weight"] = state[f"{ours}{mine}.weight"]
        dense, prefix = ("mlp", "mlp.") if c.is_dense(i) else ("moe.shared", "mlp.shared_experts.")
        gate, up = state[f"{ours}{dense}.gate_up.weight"].chunk(2)
        out[f"{theirs}{prefix}gate_proj.weight"], out[f"{theirs}{prefix}up_proj.weight"] = gate, up
        out[f"{theirs}{prefix}down_proj.weight"] = state[f"{ours}{dense}.down.weight"]
        if not c.is_dense(i):
            out[theirs + "mlp.experts.gate_up_proj"] = state[ours + "moe.experts.gate_up.weight"]
            out[theirs + "mlp.experts.down_proj"] = state[ours + "moe.experts.down.weight"]
            out[theirs + "mlp.gate.weight"] = state[ours + "moe.router.weight"]
            if ours + "moe.router.bias_E" in state:
                out[theirs + "mlp.gate.e_score_correction_bias"] = state[ours + "moe.router.bias_E"]
    return out


def randomize(model: Transformer) -> None:
    """Norm gains that differ from one, biases that differ from zero, and router biases that are mostly negative."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            if name.endswith("bias_E"):
                tensor.uniform_(-1.5, 0.2)
            if name.endswith("_bias"):
                tensor.normal_(0, 0.2)


def transformers_model(c: ModelConfig, state: dict[str, Tensor]) -> DeepseekV3ForCausalLM:
    """The same weights in the model of `transformers`, FP32."""
    theirs = DeepseekV3ForCausalLM(hf_config(c)).float()
    missing, unexpected = theirs.load_state_dict(hf_names(c, state), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return theirs


def pair(c: ModelConfig, seed: int = 0) -> tuple[Transformer, DeepseekV3ForCausalLM]:
    """Ours and theirs in FP32 with the same random weights, norms and biases."""
    torch.manual_seed(seed)
    ours = Transformer(c, Recipe(Precision.FP32), LocalDispatcher(c.experts.num_experts))
    init_weights(ours, seed)
    randomize(ours)
    return ours, transformers_model(c, ours.state_dict())
