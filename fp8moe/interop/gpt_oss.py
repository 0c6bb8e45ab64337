"""GPT-OSS: biases everywhere, sinks, a window in every other layer; experts fused in one tensor, [E, D, 2F].

There an expert's matrices are transposed, and the columns of gate and up alternate. It was released in MXFP4, which is
not read: transformers writes it in BF16 (`Mxfp4Config(dequantize=True)`, then `save_pretrained`). Its readers have no
block FP8 of it, so it is exported in BF16 or FP32.
"""

from __future__ import annotations

from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.interop.config_json import Keys
from fp8moe.interop.family import Family
from fp8moe.interop.grouped import attention_names
from fp8moe.interop.names import Parameter, RowOrder, Source, matrix, vector
from fp8moe.interop.rope import read_rope, write_rope
from fp8moe.interop.shared_names import copies, ends, norms
from fp8moe.layers.attention import GqaConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig

_KINDS = {True: "sliding_attention", False: "full_attention"}


def read_gpt_oss(keys: Keys) -> ModelConfig:
    """The model of a config.json."""
    keys.only("hidden_act", ("silu",), "another activation of the experts")
    keys.only("attention_dropout", (0.0, 0), "dropout of attention")
    keys.only("tie_word_embeddings", (False,), "the tie of embedding and head")
    keys.only("swiglu_alpha", (1.702,), "another slope of the experts' activation")
    keys.only("attention_bias", (True,), "attention without biases")
    if not keys.has("rope_parameters"):
        keys.take("rope_scaling")  # without it transformers would extend the context by YaRN, and others not
    max_position = keys.whole("max_position_embeddings")
    theta, yarn = read_rope(keys, theta=150000.0, max_position=max_position)
    layers, size = keys.whole("num_hidden_layers"), keys.whole("head_dim", 64)
    window = keys.whole("sliding_window", 128)
    which = _window_layers(keys, keys.take("layer_types", [_KINDS[i % 2 == 0] for i in range(layers)]))
    attention = GqaConfig(
        num_heads=keys.whole("num_attention_heads"),
        num_kv_heads=keys.whole("num_key_value_heads"),
        head_dim=size,
        rope_dim=size,
        rope_theta=theta,
        yarn=yarn,
        qkv_bias=True,
        o_bias=True,
        window=None if which is None else window,
        window_layers=which or "all",
        sinks=True,
    )
    router = RouterConfig(
        score="softmax_topk",
        topk=keys.whole("num_experts_per_tok", keys.whole("experts_per_token", 4)),
        aux_loss_alpha=float(keys.number("router_aux_loss_coef", 0.0)),
        bias_gamma=0.0,
        gate_bias=True,
    )
    hidden = keys.whole("intermediate_size")
    experts = ExpertsConfig(
        keys.whole("num_local_experts"),
        hidden,
        0,
        activation="swiglu_clamped",
        swiglu_limit=float(keys.number("swiglu_limit", 7.0)),
        bias=True,
    )
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        dim=keys.whole("hidden_size"),
        num_layers=layers,
        num_dense_layers=0,
        dense_hidden=hidden,
        attention=attention,
        router=router,
        experts=experts,
        norm_eps=float(keys.number("rms_norm_eps", 1e-5)),
        init_std=float(keys.number("initializer_range", 0.02)),
        max_seq_len=max_position,
    )
    keys.finish(("initial_context_length", "num_experts", "experts_per_token"))  # as rope_scaling and others say
    return config


def _window_layers(keys: Keys, kinds: list[str]) -> Any:
    """Which layers have the window: all, even, odd; None for none."""
    for which, has in (("even", lambda i: i % 2 == 0), ("odd", lambda i: i % 2 == 1), ("all", lambda _: True)):
        if kinds == [_KINDS[has(i)] for i in range(len(kinds))]:
            return which
    if set(kinds) == {_KINDS[False]}:
        return None
    raise ConfigError(
        f"{keys.where}: layer_types={kinds!r:.80} is not supported, windows in other layers would be lost: use a "
        "window in all, the even, the odd or no layers"
    )


def write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    """The keys of GPT-OSS. Raises ConfigError where the model is another."""
    a, r, e = c.attention, c.router, c.experts
    if not isinstance(a, GqaConfig):
        raise ConfigError(f"model.attention.kind={a.kind} is none of gpt_oss, which has gqa: export another family")
    wanted = {
        "model.attention.qkv_bias": (a.qkv_bias, True),
        "model.attention.o_bias": (a.o_bias, True),
        "model.attention.sinks": (a.sinks, True),
        "model.attention.qk_norm": (a.qk_norm, "none"),
        "model.attention.clip_qkv": (a.clip_qkv, None),
        "model.attention.rope_dim": (a.rope_dim, a.head_dim),
        "model.router.score": (r.score, "softmax_topk"),
        "model.router.gate_bias": (r.gate_bias, True),
        "model.router.route_scale": (r.route_scale, 1.0),
        "model.router.num_groups": (r.num_groups, 1),
        "model.experts.activation": (e.activation, "swiglu_clamped"),
        "model.experts.bias": (e.bias, True),
        "model.experts.num_shared": (e.num_shared, 0),
        "model.num_dense_layers": (c.num_dense_layers, 0),
        "model.dense_layers": (c.dense_layers, ()),
        "model.mtp_depth": (c.mtp_depth, 0),
    }
    for name, (there, value) in wanted.items():
        if there != value:
            raise ConfigError(f"{name}={there} can't be said in gpt_oss, which has {value}")
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": e.hidden,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "sliding_window": a.window or 128,
        "layer_types": [_KINDS[a.window_of(i) is not None] for i in range(c.num_layers)],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "num_local_experts": e.num_experts,
        "num_experts_per_tok": r.topk,
        "swiglu_limit": e.swiglu_limit,
        "router_aux_loss_coef": r.aux_loss_alpha,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        **write_rope(a.rope_theta, a.yarn),
    }


def parameters(c: ModelConfig, fused: bool) -> list[Parameter]:
    """The name map; experts are fused in every release."""
    first, last = ends(c)
    found = []
    for i in range(c.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        found += [*norms(c, ours, theirs), *attention_names(c, f"{ours}.attn", f"{theirs}.self_attn")]
        found += _experts(c, f"{ours}.moe", f"{theirs}.mlp")
    return [*first, *found, *last]


def _experts(c: ModelConfig, ours: str, theirs: str) -> list[Parameter]:
    n, d, f = c.experts.num_experts, c.dim, c.experts.hidden
    joint, down = f"{theirs}.experts.gate_up_proj", f"{theirs}.experts.down_proj"
    halves = [(e, RowOrder("strided", 2, first=half)) for e in range(n) for half in (0, 1)]
    gate_up = tuple(Source(joint, (n, d, 2 * f), f, e, transposed=True, order=order) for e, order in halves)
    biases = tuple(Source(f"{joint}_bias", (n, 2 * f), f, e, order=order) for e, order in halves)
    downs = tuple(Source(down, (n, f, d), d, e, transposed=True) for e in range(n))
    return [
        matrix(f"{ours}.router.weight", [(f"{theirs}.router.weight", n)], d, linear=False),
        vector(f"{ours}.router.gate_bias", f"{theirs}.router.bias", n),
        Parameter(f"{ours}.router", (n,), (), is_bias=True),
        Parameter(f"{ours}.experts.gate_up.weight", (n, 2 * f, d), gate_up, linear=True),
        Parameter(f"{ours}.experts.gate_up_bias", (n, 2 * f), biases, is_flat=True),
        Parameter(f"{ours}.experts.down.weight", (n, d, f), downs, linear=True),
        matrix(f"{ours}.experts.down_bias", [(f"{down}_bias", n)], d, linear=False),
    ]


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read_gpt_oss, write_gpt_oss, parameters, copies, has_fp8=False)
