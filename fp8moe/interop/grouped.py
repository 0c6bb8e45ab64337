"""Qwen3-MoE, GLM-4.5 and OLMoE: grouped-query attention, rotated in halves there and in pairs here (`names.RowOrder`).

What one family has and another has not (dense layers, shared experts, a bias that balances, clipping) is a key of its
config.json or a constant of the family; the name map is the same for all three.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.interop.config_json import Keys
from fp8moe.interop.family import Family
from fp8moe.interop.names import Parameter, RowOrder, Source, matrix
from fp8moe.interop.rope import read_rope, write_rope
from fp8moe.interop.shared_names import copies, parameters_around
from fp8moe.layers.attention import GqaConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig


def _read(
    keys: Keys, attention: dict[str, Any], router: RouterConfig, *, theta: float, rotary: float, **more: Any
) -> ModelConfig:
    """What the three share. attention: fields of GqaConfig that they do not; theta, rotary: the base of the rotation
    and the share of a head that it turns, where the file has none."""
    keys.only("hidden_act", ("silu",), "another activation of the experts")
    keys.only("attention_dropout", (0.0, 0), "dropout of attention")
    keys.only("tie_word_embeddings", (False,), "the tie of embedding and head")
    keys.only("use_sliding_window", (False,), "the window of attention")
    dim, heads = keys.whole("hidden_size"), keys.divisor("num_attention_heads")
    size = keys.whole("head_dim", dim // heads)
    share = dict(keys.take("rope_parameters", {})).get("partial_rotary_factor")
    share = keys.number("partial_rotary_factor", rotary) if share is None else share
    max_position = keys.whole("max_position_embeddings")
    base, yarn = read_rope(keys, theta=theta, max_position=max_position)
    own = GqaConfig(
        num_heads=heads,
        num_kv_heads=keys.whole("num_key_value_heads", heads),
        head_dim=size,
        rope_dim=int(size * share),
        rope_theta=base,
        yarn=yarn,
        **attention,
    )
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        dim=dim,
        num_layers=keys.whole("num_hidden_layers"),
        dense_hidden=keys.whole("intermediate_size"),
        attention=own,
        router=router,
        norm_eps=float(keys.number("rms_norm_eps")),
        init_std=float(keys.number("initializer_range", 0.02)),
        max_seq_len=max_position,
        **more,
    )
    keys.finish(("sliding_window", "max_window_layers"))  # of a window that use_sliding_window turns off
    return config


def _num_experts(keys: Keys) -> int:
    """Of the released files' key, or of the one that transformers 5 writes."""
    newer = keys.whole("num_local_experts", None)
    return int(keys.whole("num_experts") if newer is None else newer)


def read_qwen3(keys: Keys) -> ModelConfig:
    """Qwen3-MoE: heads' norms, softmax over all experts, dense layers by two keys."""
    has_bias = bool(keys.take("attention_bias", False))
    attention = {"qk_norm": "head", "qkv_bias": has_bias, "o_bias": has_bias}
    router = RouterConfig(
        score="softmax",
        topk=keys.whole("num_experts_per_tok", 8),
        normalize_topk=bool(keys.take("norm_topk_prob", False)),
        aux_loss_alpha=float(keys.number("router_aux_loss_coef", 0.001)),
        bias_gamma=0.0,
    )
    layers, step = keys.whole("num_hidden_layers"), keys.divisor("decoder_sparse_step", 1)
    listed = set(keys.take("mlp_only_layers", ()))
    dense = [layer for layer in range(layers) if layer in listed or (layer + 1) % step]
    first = next(i for i in range(layers + 1) if i == layers or i not in dense)
    experts = ExpertsConfig(_num_experts(keys), keys.whole("moe_intermediate_size"), 0)
    further = tuple(layer for layer in dense if layer > first)
    return _read(
        keys, attention, router, theta=1e6, rotary=1.0, experts=experts, num_dense_layers=first, dense_layers=further
    )


def read_glm4(keys: Keys) -> ModelConfig:
    """GLM-4.5: biases of q, k and v, part of a head rotated, sigmoid scores with a bias, shared experts, MTP."""
    attention = {
        "qk_norm": "head" if keys.take("use_qk_norm", False) else "none",
        "qkv_bias": bool(keys.take("attention_bias", False)),
    }
    router = RouterConfig(
        score="sigmoid",
        topk=keys.whole("num_experts_per_tok"),
        num_groups=keys.whole("n_group", 1),
        top_groups=keys.whole("topk_group", 1),
        normalize_topk=bool(keys.take("norm_topk_prob", True)),
        route_scale=float(keys.number("routed_scaling_factor", 1.0)),
    )
    modules = keys.whole("num_nextn_predict_layers", keys.whole("num_mtp_layers", 0))
    experts = ExpertsConfig(
        keys.whole("n_routed_experts"), keys.whole("moe_intermediate_size"), keys.whole("n_shared_experts")
    )
    dense = min(keys.whole("num_hidden_layers"), keys.whole("first_k_dense_replace", 1))
    config = _read(keys, attention, router, theta=1e6, rotary=0.5, experts=experts, num_dense_layers=dense)
    return replace(config, mtp_depth=min(1, modules))


def read_olmoe(keys: Keys) -> ModelConfig:
    """OLMoE: norms over all heads, softmax over all experts, not renormalised, clipping."""
    has_bias = bool(keys.take("attention_bias", False))
    clip = keys.number("clip_qkv", None)
    attention = {
        "qk_norm": "full",
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "clip_qkv": None if clip is None else float(clip),
    }
    router = RouterConfig(
        score="softmax",
        topk=keys.whole("num_experts_per_tok", 8),
        normalize_topk=bool(keys.take("norm_topk_prob", False)),
        aux_loss_alpha=float(keys.number("router_aux_loss_coef", 0.01)),
        bias_gamma=0.0,
    )
    experts = ExpertsConfig(_num_experts(keys), keys.whole("intermediate_size"), 0)
    return _read(keys, attention, router, theta=1e4, rotary=1.0, experts=experts, num_dense_layers=0)


def _write(c: ModelConfig, family: str, score: str, **fields: Any) -> dict[str, Any]:
    """The keys that the three share. fields: what GqaConfig must have. Raises ConfigError where it has not."""
    a, r = c.attention, c.router
    if not isinstance(a, GqaConfig):
        raise ConfigError(f"model.attention.kind={a.kind} is none of {family}, which has gqa: export another family")
    if r.score != score or (r.group_score != "top2_sum" and r.num_groups > 1):
        raise ConfigError(f"model.router.score={r.score} can't be said in {family}, which has {score}")
    for name, value in {"window": None, "sinks": False, **fields}.items():
        if getattr(a, name) != value:
            raise ConfigError(f"model.attention.{name}={getattr(a, name)} can't be said in {family}, which has {value}")
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.dense_hidden,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "num_experts_per_tok": r.topk,
        "norm_topk_prob": r.normalize_topk,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "attention_bias": a.qkv_bias,
        "attention_dropout": 0.0,
        **write_rope(a.rope_theta, a.yarn),
    }


def _check(c: ModelConfig, family: str, **wanted: Any) -> None:
    """Raise ConfigError where the model has what the family has no key for."""
    there = {
        "experts.num_shared": c.experts.num_shared,
        "mtp_depth": c.mtp_depth,
        "router.num_groups": c.router.num_groups,
        "router.route_scale": c.router.route_scale,
        "num_dense_layers": c.num_dense_layers,
        "dense_layers": c.dense_layers,
        "dense_hidden": c.dense_hidden,
        "attention.head_dim": getattr(c.attention, "head_dim", 0),
    }
    for name, value in wanted.items():
        key = name.replace("__", ".")
        if there[key] != value:
            raise ConfigError(f"model.{key}={there[key]} can't be said in {family}, which has {value}")


def _heads(c: ModelConfig) -> tuple[int, bool]:
    """(features of a head, biases of q, k and v) of grouped attention."""
    a = c.attention
    return (a.head_dim, a.qkv_bias) if isinstance(a, GqaConfig) else (0, False)


def write_qwen3(c: ModelConfig) -> dict[str, Any]:
    """The keys of Qwen3-MoE."""
    size, has_bias = _heads(c)
    keys = _write(c, "qwen3_moe", "softmax", qk_norm="head", o_bias=has_bias, clip_qkv=None, rope_dim=size)
    _check(c, "qwen3_moe", experts__num_shared=0, mtp_depth=0, router__num_groups=1, router__route_scale=1.0)
    return keys | {
        "head_dim": size,
        "num_experts": c.experts.num_experts,
        "moe_intermediate_size": c.experts.hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(c.num_layers) if c.is_dense(layer)],
        "router_aux_loss_coef": c.router.aux_loss_alpha,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def write_glm4(c: ModelConfig) -> dict[str, Any]:
    """The keys of GLM-4.5."""
    a = c.attention
    norm = "head" if isinstance(a, GqaConfig) and a.qk_norm == "head" else "none"
    keys = _write(c, "glm4_moe", "sigmoid", qk_norm=norm, o_bias=False, clip_qkv=None)
    _check(c, "glm4_moe", dense_layers=())
    if not c.experts.num_shared:
        raise ConfigError("model.experts.num_shared=0 can't be said in glm4_moe, which has shared experts: use 1")
    assert isinstance(a, GqaConfig)
    return keys | {
        "head_dim": a.head_dim,
        "partial_rotary_factor": a.rope_dim / a.head_dim,
        "use_qk_norm": norm == "head",
        "n_routed_experts": c.experts.num_experts,
        "n_shared_experts": c.experts.num_shared,
        "moe_intermediate_size": c.experts.hidden,
        "routed_scaling_factor": c.router.route_scale,
        "n_group": c.router.num_groups,
        "topk_group": c.router.top_groups,
        "first_k_dense_replace": c.num_dense_layers,
        "num_nextn_predict_layers": c.mtp_depth,
    }


def write_olmoe(c: ModelConfig) -> dict[str, Any]:
    """The keys of OLMoE."""
    size, has_bias = _heads(c)
    keys = _write(c, "olmoe", "softmax", qk_norm="full", o_bias=has_bias, rope_dim=size)
    _check(c, "olmoe", experts__num_shared=0, mtp_depth=0, router__num_groups=1, router__route_scale=1.0)
    _check(c, "olmoe", num_dense_layers=0, dense_layers=(), dense_hidden=c.experts.hidden)
    assert isinstance(c.attention, GqaConfig)
    _check(c, "olmoe", attention__head_dim=c.dim // c.attention.num_heads)
    return keys | {
        "num_experts": c.experts.num_experts,
        "clip_qkv": c.attention.clip_qkv,
        "router_aux_loss_coef": c.router.aux_loss_alpha,
    }


def attention_names(c: ModelConfig, ours: str, theirs: str) -> list[Parameter]:
    """The map of grouped-query attention: q, k and v are one weight here, rows of q and k in another order."""
    a = c.attention
    assert isinstance(a, GqaConfig)
    order = RowOrder("heads", a.head_dim, a.rope_dim) if a.rope_dim else None
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    parts = (("q", q, order), ("k", kv, order), ("v", kv, None))
    rows = tuple(Source(f"{theirs}.{x}_proj.weight", (n, c.dim), n, order=o) for x, n, o in parts)
    found = [
        Parameter(f"{ours}.qkv.weight", (q + 2 * kv, c.dim), rows, linear=True),
        matrix(f"{ours}.o.weight", [(f"{theirs}.o_proj.weight", c.dim)], q),
    ]
    if a.qkv_bias:
        biases = tuple(Source(f"{theirs}.{x}_proj.bias", (n,), n, order=o) for x, n, o in parts)
        found.append(Parameter(f"{ours}.qkv_bias", (q + 2 * kv,), biases))
    if a.o_bias:
        found.append(Parameter(f"{ours}.o_bias", (c.dim,), (Source(f"{theirs}.o_proj.bias", (c.dim,), c.dim),)))
    if a.qk_norm != "none":
        sizes = (a.head_dim, a.head_dim) if a.qk_norm == "head" else (q, kv)
        for x, n in zip("qk", sizes, strict=True):
            source = Source(f"{theirs}.{x}_norm.weight", (n,), n, order=order)
            found.append(Parameter(f"{ours}.{x}_norm.weight", (n,), (source,)))
    if a.sinks:
        found.append(
            Parameter(f"{ours}.sinks", (a.num_heads,), (Source(f"{theirs}.sinks", (a.num_heads,), a.num_heads),))
        )
    return found


parameters = parameters_around(attention_names)
QWEN3 = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3, write_qwen3, parameters, copies)
GLM4 = Family("glm4_moe", "Glm4MoeForCausalLM", read_glm4, write_glm4, parameters, copies)
OLMOE = Family("olmoe", "OlmoeForCausalLM", read_olmoe, write_olmoe, parameters, copies)
