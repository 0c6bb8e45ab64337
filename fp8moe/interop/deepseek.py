"""DeepSeek-V2, DeepSeek-V3 and Kimi-K2: latent attention, shared experts, first dense layers; V3 has MTP.

Kimi-K2 is DeepSeek-V3 under a name of its own. Latent norms have eps 1e-6 in both families whatever `rms_norm_eps`, as
the released code and transformers have it (vLLM takes rms_norm_eps there). The rotary part is in pairs (2i, 2i + 1) in
the released weights as it is here, so no row moves.
"""

from __future__ import annotations

from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.interop.config_json import Keys
from fp8moe.interop.family import Family
from fp8moe.interop.names import Parameter, matrix, vector
from fp8moe.interop.rope import read_rope, write_rope
from fp8moe.interop.shared_names import copies, parameters_around
from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig

LATENT_EPS = 1e-6


def _read(keys: Keys, router: RouterConfig, num_shared: int) -> ModelConfig:
    """What V2 and V3 share."""
    keys.only("hidden_act", ("silu",), "another activation of the experts")
    keys.only("attention_bias", (False,), "the biases of attention")
    keys.only("mlp_bias", (False,), "the biases of the MLPs")
    keys.only("attention_dropout", (0.0, 0), "dropout of attention")
    keys.only("tie_word_embeddings", (False,), "the tie of embedding and head")
    keys.only("moe_layer_freq", (1,), "dense layers between those with experts")
    keys.only("rope_interleave", (True,), "the rotation in halves")
    heads = keys.whole("num_attention_heads")
    keys.only("num_key_value_heads", (heads,), "heads that share keys and values")
    keys.take("head_dim", None)  # the rotary part's, derived
    max_position = keys.whole("max_position_embeddings", 4096)
    theta, yarn = read_rope(keys, theta=10000.0, max_position=max_position)
    layers = keys.whole("num_hidden_layers")
    attention = MlaConfig(
        num_heads=heads,
        q_lora_rank=keys.whole("q_lora_rank", 0),
        kv_lora_rank=keys.whole("kv_lora_rank"),
        nope_dim=keys.whole("qk_nope_head_dim"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        v_dim=keys.whole("v_head_dim"),
        rope_theta=theta,
        yarn=yarn,
        norm_eps=LATENT_EPS,
    )
    modules = keys.whole("num_nextn_predict_layers", keys.whole("num_mtp_layers", 0))
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        dim=keys.whole("hidden_size"),
        num_layers=layers,
        num_dense_layers=min(layers, keys.whole("first_k_dense_replace", 0)),
        dense_hidden=keys.whole("intermediate_size"),
        attention=attention,
        router=router,
        experts=ExpertsConfig(keys.whole("n_routed_experts"), keys.whole("moe_intermediate_size"), num_shared),
        mtp_depth=min(1, modules),
        norm_eps=float(keys.number("rms_norm_eps", 1e-6)),
        init_std=float(keys.number("initializer_range", 0.02)),
        max_seq_len=max_position,
    )
    keys.finish()
    return config


def _balance(keys: Keys) -> float:
    alpha = float(keys.number("aux_loss_alpha", 0.0))
    if alpha:
        keys.only("seq_aux", (True,), "the balance loss over a whole batch")
    keys.take("seq_aux", None)
    return alpha


def read_v3(keys: Keys) -> ModelConfig:
    """DeepSeek-V3: sigmoid scores, a bias that balances, groups by the sum of their two best."""
    keys.only("scoring_func", ("sigmoid",), "another score of experts")
    keys.only("topk_method", ("noaux_tc",), "another choice of experts")
    router = RouterConfig(
        score="sigmoid",
        topk=keys.whole("num_experts_per_tok"),
        num_groups=keys.whole("n_group", 1),
        top_groups=keys.whole("topk_group", 1),
        group_score="top2_sum",
        normalize_topk=bool(keys.take("norm_topk_prob", True)),
        route_scale=float(keys.number("routed_scaling_factor", 1.0)),
        aux_loss_alpha=_balance(keys),
        bias_gamma=1e-3,
    )
    return _read(keys, router, keys.whole("n_shared_experts"))


def read_v2(keys: Keys) -> ModelConfig:
    """DeepSeek-V2: softmax scores without bias, groups by their best expert, weights not normalised."""
    keys.only("scoring_func", ("softmax",), "another score of experts")
    keys.only("norm_topk_prob", (False,), "weights that are normalised over the chosen experts")
    method = keys.take("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(
            f"{keys.where}: topk_method={method!r} is not supported, another choice of experts would be lost: use "
            "greedy or group_limited_greedy"
        )
    groups, top = keys.whole("n_group", 1), keys.whole("topk_group", 1)
    is_limited = method == "group_limited_greedy"
    router = RouterConfig(
        score="softmax",
        topk=keys.whole("num_experts_per_tok"),
        num_groups=groups if is_limited else 1,
        top_groups=top if is_limited else 1,
        group_score="max" if is_limited else "top2_sum",
        normalize_topk=False,
        route_scale=float(keys.number("routed_scaling_factor", 1.0)),
        aux_loss_alpha=_balance(keys),
        bias_gamma=0.0,
    )
    return _read(keys, router, keys.whole("n_shared_experts"))


def _write(c: ModelConfig, family: str) -> dict[str, Any]:
    a, r, e = c.attention, c.router, c.experts
    if not isinstance(a, MlaConfig):
        raise ConfigError(f"model.attention.kind={a.kind} is none of {family}, which has mla: export another family")
    if a.norm_eps != LATENT_EPS:
        raise ConfigError(
            f"model.attention.norm_eps={a.norm_eps} can't be said in {family}, whose latent norms have 1e-6"
        )
    if c.dense_layers:
        raise ConfigError(f"model.dense_layers={c.dense_layers} can't be said in {family}: the first layers are dense")
    if not e.num_shared:
        raise ConfigError(f"model.experts.num_shared=0 can't be said in {family}, which has shared experts: use 1")
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.dense_hidden,
        "moe_intermediate_size": e.hidden,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "n_shared_experts": e.num_shared,
        "n_routed_experts": e.num_experts,
        "ep_size": 1,
        "routed_scaling_factor": r.route_scale,
        "kv_lora_rank": a.kv_lora_rank,
        "q_lora_rank": a.q_lora_rank or None,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.v_dim,
        "qk_nope_head_dim": a.nope_dim,
        "n_group": r.num_groups,
        "topk_group": r.top_groups,
        "num_experts_per_tok": r.topk,
        "moe_layer_freq": 1,
        "first_k_dense_replace": c.num_dense_layers,
        "norm_topk_prob": r.normalize_topk,
        "aux_loss_alpha": r.aux_loss_alpha,
        "seq_aux": True,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **write_rope(a.rope_theta, a.yarn),
    }


def write_v3(c: ModelConfig) -> dict[str, Any]:
    """The keys of DeepSeek-V3. Raises ConfigError where the model routes otherwise."""
    r = c.router
    if r.score != "sigmoid" or (r.group_score != "top2_sum" and r.num_groups > 1):
        raise ConfigError(
            f"model.router.score={r.score} with group_score={r.group_score} can't be said in deepseek_v3, which has "
            "sigmoid and top2_sum"
        )
    v3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": c.mtp_depth}
    return _write(c, "deepseek_v3") | v3


def write_v2(c: ModelConfig) -> dict[str, Any]:
    """The keys of DeepSeek-V2. Raises ConfigError where the model routes otherwise, or has MTP."""
    r = c.router
    if r.score != "softmax" or r.normalize_topk or (r.group_score != "max" and r.num_groups > 1):
        raise ConfigError(
            f"model.router.score={r.score} with group_score={r.group_score} and normalize_topk={r.normalize_topk} "
            "can't be said in deepseek_v2, which has softmax, max and false"
        )
    if c.mtp_depth:
        raise ConfigError("model.mtp_depth=1 can't be said in deepseek_v2, which has no MTP: use --mtp drop")
    method = "group_limited_greedy" if r.num_groups > 1 else "greedy"
    return _write(c, "deepseek_v2") | {"scoring_func": "softmax", "topk_method": method}


def _attention(c: ModelConfig, ours: str, theirs: str) -> list[Parameter]:
    a = c.attention
    assert isinstance(a, MlaConfig)
    kv_a = (f"{theirs}.kv_a_proj_with_mqa.weight", a.kv_lora_rank + a.rope_dim)
    if a.q_lora_rank:
        queries = [
            matrix(f"{ours}.qkv_a.weight", [(f"{theirs}.q_a_proj.weight", a.q_lora_rank), kv_a], c.dim),
            vector(f"{ours}.q_norm.weight", f"{theirs}.q_a_layernorm.weight", a.q_lora_rank),
            matrix(f"{ours}.q_b.weight", [(f"{theirs}.q_b_proj.weight", a.queries)], a.q_lora_rank),
        ]
    else:
        queries = [matrix(f"{ours}.qkv_a.weight", [(f"{theirs}.q_proj.weight", a.queries), kv_a], c.dim)]
    up = a.num_heads * (a.nope_dim + a.v_dim)
    return [
        *queries,
        vector(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight", a.kv_lora_rank),
        matrix(f"{ours}.kv_b.weight", [(f"{theirs}.kv_b_proj.weight", up)], a.kv_lora_rank),
        matrix(f"{ours}.o.weight", [(f"{theirs}.o_proj.weight", c.dim)], a.num_heads * a.v_dim),
    ]


parameters = parameters_around(_attention)
V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, write_v3, parameters, copies)
KIMI_K2 = Family("kimi_k2", "DeepseekV3ForCausalLM", read_v3, write_v3, parameters, copies)
V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, parameters, copies)
