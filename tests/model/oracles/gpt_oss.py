"""GPT-OSS in `transformers`, with the same weights as ours; its experts' gate and up columns alternate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from fp8moe.model.config import ModelConfig
from tests.model.oracles.grouped import attention_of, halves_first


def gpt_oss(c: ModelConfig) -> GptOssConfig:
    """The same model as a configuration of `transformers`."""
    a, r, e = attention_of(c), c.router, c.experts
    assert (a.qkv_bias, a.o_bias, a.sinks, r.gate_bias, e.bias) == (True,) * 5 and a.rope_dim == a.head_dim
    assert (r.score, e.activation, e.num_shared, a.qk_norm) == ("softmax_topk", "swiglu_clamped", 0, "none")
    kinds = ["full_attention" if a.window_of(i) is None else "sliding_attention" for i in range(c.num_layers)]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.yarn:
        y = a.yarn
        rope |= {"rope_type": "yarn", "factor": y.factor, "beta_fast": y.beta_fast, "beta_slow": y.beta_slow,
                 "truncate": y.truncate, "original_max_position_embeddings": y.original_max_seq_len}  # fmt: skip
    return GptOssConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.num_layers, num_local_experts=e.num_experts,
        intermediate_size=e.hidden, head_dim=a.head_dim, num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads, sliding_window=a.window, layer_types=kinds, rms_norm_eps=c.norm_eps,
        num_experts_per_tok=r.topk, swiglu_limit=e.swiglu_limit, rope_parameters=rope, tie_word_embeddings=False,
        max_position_embeddings=c.max_seq_len, attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip


def their_gpt_oss(c: ModelConfig, state: dict[str, Tensor]) -> GptOssForCausalLM:
    """The same weights in the model of `transformers`, FP32."""
    theirs = GptOssForCausalLM(gpt_oss(c)).float()
    missing, unexpected = theirs.load_state_dict(gpt_oss_names(c, state), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return theirs


def gpt_oss_names(c: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under the names and in the order of `transformers`."""
    a = attention_of(c)
    out = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for i in range(c.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        out[theirs + "input_layernorm.weight"] = state[ours + "attn_norm.weight"]
        out[theirs + "post_attention_layernorm.weight"] = state[ours + "mlp_norm.weight"]
        for kind, name in (("weight", "qkv.weight"), ("bias", "qkv_bias")):
            q, k, v = state[f"{ours}attn.{name}"].split([a.queries, a.keys, a.keys])
            for letter, rows in (("q", halves_first(q, a)), ("k", halves_first(k, a)), ("v", v)):
                out[f"{theirs}self_attn.{letter}_proj.{kind}"] = rows
        out[theirs + "self_attn.o_proj.weight"] = state[ours + "attn.o.weight"]
        out[theirs + "self_attn.o_proj.bias"] = state[ours + "attn.o_bias"]
        out[theirs + "self_attn.sinks"] = state[ours + "attn.sinks"]
        out[theirs + "mlp.router.weight"] = state[ours + "moe.router.weight"]
        out[theirs + "mlp.router.bias"] = state[ours + "moe.router.gate_bias"]
        experts = f"{ours}moe.experts."
        out[theirs + "mlp.experts.gate_up_proj"] = alternating(state[experts + "gate_up.weight"].mT)
        out[theirs + "mlp.experts.gate_up_proj_bias"] = alternating(state[experts + "gate_up_bias"])
        out[theirs + "mlp.experts.down_proj"] = state[experts + "down.weight"].mT
        out[theirs + "mlp.experts.down_proj_bias"] = state[experts + "down_bias"]
    return out


def alternating(columns: Tensor) -> Tensor:
    """[..., gate and up, F each] -> gate, up, gate, up and so on."""
    return torch.stack(columns.chunk(2, -1), -1).flatten(-2)
