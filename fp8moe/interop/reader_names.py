"""What vLLM's and SGLang's loaders look for in a directory: names and shapes of every tensor, from config.json alone.

Written from the loaders, not from our name maps, so that one checks the other: vLLM 0.33
(vllm/model_executor/models/deepseek_v2.py, deepseek_mtp.py, qwen3_moe.py, glm4_moe.py, glm4_moe_mtp.py, olmoe.py) and
SGLang 0.5.23 (python/sglang/srt/models/, files of the same names). Both have a parameter for every tensor named here
and raise KeyError, or pass over it in silence, at any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
MLA_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# Keys that the loaders read, by family; of the second list the loader has a default that differs from the model's.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mla": (
        (
            *(
                "first_k_dense_replace",
                "intermediate_size",
                "kv_lora_rank",
                "moe_intermediate_size",
                "n_routed_experts",
            ),
            *("n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "q_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "routed_scaling_factor", "v_head_dim", "topk_method"),
        ),
        ("scoring_func", "n_group", "topk_group", "moe_layer_freq"),
    ),
    "qwen3_moe": (
        ("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        ("decoder_sparse_step", "mlp_only_layers", "attention_bias"),
    ),
    "glm4_moe": (
        (
            *("head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
            *("first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
        ),
        ("partial_rotary_factor", "use_qk_norm", "attention_bias"),
    ),
    "olmoe": (("num_experts", "num_experts_per_tok"), ("norm_topk_prob", "clip_qkv")),
    "gpt_oss": (
        ("head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window"),
        ("layer_types", "attention_bias"),
    ),
}
COMMON = (
    *("architectures", "model_type", "hidden_size", "hidden_act", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "torch_dtype"),
    "vocab_size",
)


def expected(c: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a model of this config.json has, without scales."""
    d, v = c["hidden_size"], c["vocab_size"]
    found = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for layer in range(c["num_hidden_layers"]):
        found |= dict(_layer(c, layer))
    for layer in range(c["num_hidden_layers"], c["num_hidden_layers"] + (c.get("num_nextn_predict_layers") or 0)):
        name = f"model.layers.{layer}"
        found |= dict(_layer(c, layer))
        found |= {f"{name}.{norm}.weight": (d,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        found |= {f"{name}.eh_proj.weight": (d, 2 * d)}
        found |= {f"{name}.{one}.weight": (v, d) for one in ("embed_tokens", "shared_head.head")}
    return found


def _layer(c: Mapping[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    name, d = f"model.layers.{layer}", c["hidden_size"]
    yield f"{name}.input_layernorm.weight", (d,)
    yield f"{name}.post_attention_layernorm.weight", (d,)
    yield from _latent(c, f"{name}.self_attn") if c["model_type"] in MLA_TYPES else _grouped(c, f"{name}.self_attn")
    yield from _mlp(c, layer, f"{name}.mlp")


def _latent(c: Mapping[str, Any], name: str) -> Iterator[tuple[str, Shape]]:
    d, h, r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    q = h * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    if c.get("q_lora_rank"):
        yield f"{name}.q_a_proj.weight", (c["q_lora_rank"], d)
        yield f"{name}.q_a_layernorm.weight", (c["q_lora_rank"],)
        yield f"{name}.q_b_proj.weight", (q, c["q_lora_rank"])
    else:
        yield f"{name}.q_proj.weight", (q, d)
    yield f"{name}.kv_a_proj_with_mqa.weight", (r + c["qk_rope_head_dim"], d)
    yield f"{name}.kv_a_layernorm.weight", (r,)
    yield f"{name}.kv_b_proj.weight", (h * (c["qk_nope_head_dim"] + c["v_head_dim"]), r)
    yield f"{name}.o_proj.weight", (d, h * c["v_head_dim"])


def _grouped(c: Mapping[str, Any], name: str) -> Iterator[tuple[str, Shape]]:
    d, size = c["hidden_size"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    kind = c["model_type"]
    for one, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"{name}.{one}_proj.weight", (rows, d)
        if c.get("attention_bias") and kind != "olmoe":
            yield f"{name}.{one}_proj.bias", (rows,)
    yield f"{name}.o_proj.weight", (d, q)
    if c.get("attention_bias") and kind == "gpt_oss":
        yield f"{name}.o_proj.bias", (d,)
    if kind == "gpt_oss":
        yield f"{name}.sinks", (c["num_attention_heads"],)
    if kind == "qwen3_moe" or (kind == "glm4_moe" and c.get("use_qk_norm")):
        yield from ((f"{name}.{one}_norm.weight", (size,)) for one in ("q", "k"))
    if kind == "olmoe":
        yield from ((f"{name}.q_norm.weight", (q,)), (f"{name}.k_norm.weight", (kv,)))


def _is_dense(c: Mapping[str, Any], layer: int) -> bool:
    if c["model_type"] == "qwen3_moe":
        return layer in (c.get("mlp_only_layers") or ()) or (layer + 1) % (c.get("decoder_sparse_step") or 1) != 0
    return bool(layer < (c.get("first_k_dense_replace") or 0))


def _mlp(c: Mapping[str, Any], layer: int, name: str) -> Iterator[tuple[str, Shape]]:
    d, kind = c["hidden_size"], c["model_type"]
    if _is_dense(c, layer):
        yield from _gated(name, d, c["intermediate_size"])
        return
    if kind == "gpt_oss":
        yield from _gpt_oss(c, name)
        return
    num = c["n_routed_experts"] if "n_routed_experts" in c else c["num_experts"]
    hidden = c["intermediate_size"] if kind == "olmoe" else c["moe_intermediate_size"]
    yield f"{name}.gate.weight", (num, d)
    if c.get("topk_method") == "noaux_tc" or kind == "glm4_moe":
        yield f"{name}.gate.e_score_correction_bias", (num,)
    for expert in range(num):
        yield from _gated(f"{name}.experts.{expert}", d, hidden)
    if c.get("n_shared_experts"):
        yield from _gated(f"{name}.shared_experts", d, hidden * c["n_shared_experts"])


def _gated(name: str, dim: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (hidden, dim)
    yield f"{name}.up_proj.weight", (hidden, dim)
    yield f"{name}.down_proj.weight", (dim, hidden)


def _gpt_oss(c: Mapping[str, Any], name: str) -> Iterator[tuple[str, Shape]]:
    d, f, n = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield f"{name}.router.weight", (n, d)
    yield f"{name}.router.bias", (n,)
    yield f"{name}.experts.gate_up_proj", (n, d, 2 * f)
    yield f"{name}.experts.gate_up_proj_bias", (n, 2 * f)
    yield f"{name}.experts.down_proj", (n, f, d)
    yield f"{name}.experts.down_proj_bias", (n, d)
