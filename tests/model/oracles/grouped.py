"""Families with grouped-query attention in `transformers`, with the same weights as ours: Qwen3-MoE, GLM-4.5, OLMoE.

The names, and the order of a head's features, are written here from their definitions: `transformers` rotates the
halves of a head's first features, feature i of the rotary part with feature i + rope_dim / 2; ours has the features
without position first, then pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fp8moe.layers.attention import GqaConfig
from fp8moe.model.config import ModelConfig

MODELS: dict[str, Any] = {"qwen3_moe": Qwen3MoeForCausalLM, "glm4_moe": Glm4MoeForCausalLM, "olmoe": OlmoeForCausalLM}


def attention_of(c: ModelConfig) -> GqaConfig:
    assert isinstance(c.attention, GqaConfig)
    return c.attention


def their_model(family: str, c: ModelConfig, state: dict[str, Tensor], **changes: Any) -> PreTrainedModel:
    """The same weights in the model of `transformers`, FP32; changes: of its configuration."""
    configs = {"qwen3_moe": qwen3_moe, "glm4_moe": glm4_moe, "olmoe": olmoe}
    theirs = MODELS[family](configs[family](c, **changes)).float()
    missing, unexpected = theirs.load_state_dict(their_names(c, state), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return theirs


def _sizes(c: ModelConfig) -> dict[str, Any]:
    a = attention_of(c)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.yarn:
        y = a.yarn
        rope |= {"rope_type": "yarn", "factor": y.factor, "beta_fast": y.beta_fast, "beta_slow": y.beta_slow,
                 "original_max_position_embeddings": y.original_max_seq_len}  # fmt: skip
    return dict(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.num_layers, num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads, num_experts_per_tok=c.router.topk, norm_topk_prob=c.router.normalize_topk,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, rope_parameters=rope,
        attention_bias=a.qkv_bias, tie_word_embeddings=False, attn_implementation="eager", pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def qwen3_moe(c: ModelConfig, **changes: Any) -> Qwen3MoeConfig:
    a = attention_of(c)
    assert (a.qk_norm, a.o_bias, a.rope_dim, c.router.score) == ("head", a.qkv_bias, a.head_dim, "softmax")
    dense = [layer for layer in range(c.num_layers) if c.is_dense(layer)]
    own = dict(head_dim=a.head_dim, intermediate_size=c.dense_hidden, moe_intermediate_size=c.experts.hidden,
               num_experts=c.experts.num_experts, mlp_only_layers=dense, decoder_sparse_step=1)  # fmt: skip
    return Qwen3MoeConfig(**(_sizes(c) | own | changes))


def glm4_moe(c: ModelConfig, **changes: Any) -> Glm4MoeConfig:
    a, r, e = attention_of(c), c.router, c.experts
    assert not a.o_bias and r.score == "sigmoid"
    sizes = _sizes(c)
    sizes["rope_parameters"]["partial_rotary_factor"] = a.rope_dim / a.head_dim
    own = dict(
        head_dim=a.head_dim, intermediate_size=c.dense_hidden, moe_intermediate_size=e.hidden,
        n_routed_experts=e.num_experts, n_shared_experts=e.num_shared, routed_scaling_factor=r.route_scale,
        n_group=r.num_groups, topk_group=r.top_groups, first_k_dense_replace=c.num_dense_layers,
        use_qk_norm=a.qk_norm == "head", num_mtp_layers=0,
    )  # fmt: skip
    return Glm4MoeConfig(**(sizes | own | changes))


def olmoe(c: ModelConfig, **changes: Any) -> OlmoeConfig:
    a = attention_of(c)
    assert (a.qk_norm, a.o_bias, a.rope_dim) == ("full", a.qkv_bias, a.head_dim) and a.num_heads * a.head_dim == c.dim
    own = dict(intermediate_size=c.experts.hidden, num_experts=c.experts.num_experts, clip_qkv=a.clip_qkv)
    return OlmoeConfig(**(_sizes(c) | own | changes))


def halves_first(rows: Tensor, a: GqaConfig) -> Tensor:
    """Rows [heads x head_dim, ...] or a head's [head_dim], in our order of features, in the order of `transformers`."""
    nope, half = a.head_dim - a.rope_dim, a.rope_dim // 2
    ours = [nope + 2 * i for i in range(half)] + [nope + 2 * i + 1 for i in range(half)] + list(range(nope))
    return rows.unflatten(0, (-1, a.head_dim))[:, torch.tensor(ours)].flatten(0, 1)


def their_names(c: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients), and the router's bias, by names and in the order of `transformers`."""
    out = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for i in range(c.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out[theirs + "input_layernorm.weight"] = state[ours + "attn_norm.weight"]
        out[theirs + "post_attention_layernorm.weight"] = state[ours + "mlp_norm.weight"]
        attention = _attention_names(attention_of(c), state, f"{ours}attn.")
        out |= {f"{theirs}self_attn.{name}": tensor for name, tensor in attention.items()}
        mlps = (
            {"mlp": "mlp."} if c.is_dense(i) else {"moe.shared": "mlp.shared_experts."} if c.experts.num_shared else {}
        )
        for mine, prefix in mlps.items():
            gate, up = state[f"{ours}{mine}.gate_up.weight"].chunk(2)
            out[f"{theirs}{prefix}gate_proj.weight"], out[f"{theirs}{prefix}up_proj.weight"] = gate, up
            out[f"{theirs}{prefix}down_proj.weight"] = state[f"{ours}{mine}.down.weight"]
        if not c.is_dense(i):
            out[theirs + "mlp.experts.gate_up_proj"] = state[ours + "moe.experts.gate_up.weight"]
            out[theirs + "mlp.experts.down_proj"] = state[ours + "moe.experts.down.weight"]
            out[theirs + "mlp.gate.weight"] = state[ours + "moe.router.weight"]
            if c.router.score == "sigmoid" and ours + "moe.router.bias_E" in state:
                out[theirs + "mlp.gate.e_score_correction_bias"] = state[ours + "moe.router.bias_E"]
    return out


def _attention_names(a: GqaConfig, state: dict[str, Tensor], ours: str) -> dict[str, Tensor]:
    out = {"o_proj.weight": state[ours + "o.weight"]}
    sizes = [a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.head_dim]
    kinds = [("qkv.weight", "weight"), *([("qkv_bias", "bias")] if a.qkv_bias else [])]
    for mine, kind in kinds:
        q, k, v = state[ours + mine].split(sizes)
        out |= {f"q_proj.{kind}": halves_first(q, a), f"k_proj.{kind}": halves_first(k, a), f"v_proj.{kind}": v}
    if a.o_bias:
        out["o_proj.bias"] = state[ours + "o_bias"]
    if a.qk_norm != "none":
        out |= {f"{x}_norm.weight": halves_first(state[f"{ours}{x}_norm.weight"], a) for x in "qk"}
    return out
