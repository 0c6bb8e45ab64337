"""The parts of a name map that families share: ends, norms, MLPs, MTP; and the whole of one around its attention."""

from __future__ import annotations

from collections.abc import Callable

from fp8moe.interop.names import Parameter, Source, experts, matrix, vector
from fp8moe.model.config import ModelConfig

AttentionNames = Callable[[ModelConfig, str, str], list[Parameter]]  # (model, its name here, its name there)


def parameters_around(attention: AttentionNames) -> Callable[[ModelConfig, bool], list[Parameter]]:
    """(model, whether experts are fused) -> the name map of a model without or with an MTP module."""

    def block(c: ModelConfig, number: int, ours: str, fused: bool) -> list[Parameter]:
        theirs = f"model.layers.{number}"
        attended = attention(c, f"{ours}.attn", f"{theirs}.self_attn")
        return [*norms(c, ours, theirs), *attended, *mlp(c, number, ours, f"{theirs}.mlp", fused)]

    def parameters(c: ModelConfig, fused: bool) -> list[Parameter]:
        first, last = ends(c)
        blocks = [one for i in range(c.num_layers) for one in block(c, i, f"blocks.{i}", fused)]
        module = mtp(c, block(c, c.num_layers, "mtp.block", fused)) if c.mtp_depth else []
        return [*first, *blocks, *last, *module]

    return parameters


def ends(c: ModelConfig) -> tuple[list[Parameter], list[Parameter]]:
    """What is before the first block, and behind the last."""
    return (
        [matrix("embedding.weight", [("model.embed_tokens.weight", c.vocab_size)], c.dim, linear=False)],
        [
            vector("norm.weight", "model.norm.weight", c.dim),
            matrix("head.weight", [("lm_head.weight", c.vocab_size)], c.dim, linear=False),
        ],
    )


def mtp(c: ModelConfig, block: list[Parameter]) -> list[Parameter]:
    """The MTP module, as the layer behind the last, around its block."""
    layer = f"model.layers.{c.num_layers}"
    return [
        vector("mtp.hidden_norm.weight", f"{layer}.hnorm.weight", c.dim),
        vector("mtp.embedding_norm.weight", f"{layer}.enorm.weight", c.dim),
        matrix("mtp.join.weight", [(f"{layer}.eh_proj.weight", c.dim)], 2 * c.dim),
        *block,
        vector("mtp.final_norm.weight", f"{layer}.shared_head.norm.weight", c.dim),
    ]


def copies(c: ModelConfig) -> dict[str, str]:
    """MTP's embedding and head, which are the model's own."""
    if not c.mtp_depth:
        return {}
    layer = f"model.layers.{c.num_layers}"
    return {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight",
    }


def norms(c: ModelConfig, ours: str, theirs: str) -> list[Parameter]:
    """A block's two norms."""
    return [
        vector(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", c.dim),
        vector(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", c.dim),
    ]


def mlp(c: ModelConfig, number: int, block: str, theirs: str, fused: bool) -> list[Parameter]:
    """The MLP of block `number`, named `block` here and `theirs` there."""
    if c.is_dense(number):
        return _gated(f"{block}.mlp", theirs, c.dim, c.dense_hidden)
    e, ours = c.experts, f"{block}.moe"
    n, hidden = e.num_experts, e.hidden
    bias = (Source(f"{theirs}.gate.e_score_correction_bias", (n,), n),) if c.router.score == "sigmoid" else ()

    def gate_up(i: int) -> list[tuple[str, int]]:
        return [(f"{theirs}.experts.{i}.{name}_proj.weight", hidden) for name in ("gate", "up")]

    def down(i: int) -> list[tuple[str, int]]:
        return [(f"{theirs}.experts.{i}.down_proj.weight", c.dim)]

    names = [f"{theirs}.experts.{name}_proj" if fused else None for name in ("gate_up", "down")]
    shared = _gated(f"{ours}.shared", f"{theirs}.shared_experts", c.dim, e.num_shared * hidden) if e.num_shared else []
    return [
        matrix(f"{ours}.router.weight", [(f"{theirs}.gate.weight", n)], c.dim, linear=False),
        Parameter(f"{ours}.router", (n,), bias, is_bias=True),
        experts(f"{ours}.experts.gate_up.weight", n, c.dim, gate_up, names[0]),
        experts(f"{ours}.experts.down.weight", n, hidden, down, names[1]),
        *shared,
    ]


def _gated(ours: str, theirs: str, dim: int, hidden: int) -> list[Parameter]:
    gate, up = f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"
    return [
        matrix(f"{ours}.gate_up.weight", [(gate, hidden), (up, hidden)], dim),
        matrix(f"{ours}.down.weight", [(f"{theirs}.down_proj.weight", dim)], hidden),
    ]
