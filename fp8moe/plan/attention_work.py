"""What the attention phase of a block computes, reads and writes: the rows of `docs/layer.md`, for any sizes.

In FP8 every product takes rows made by the pass before it and its weight gradient takes columns: of the recomputed
norms, and of attention's output kept in 12 bits. BF16 is the same with plain products and no casts. Bytes count each
tensor once; those of products are with the products (`gemm_time`).

Legend: T tokens of a micro-batch, D model.
"""

from __future__ import annotations

from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.plan.work import Attention, BlockWork, Pass, Piece, Product, Small

CAST = 1 + 4 / 128  # bytes of a value in 1x128 tiles, its scale included
E5M6 = 1.5 + 4 / 128
NORM, CASTS, ADD = "norms and rotation", "casts", "element-wise"


def linear(work: BlockWork, phase: str, tokens: int, n: int, k: int, *, fp8: bool, again: bool = False) -> None:
    """A Linear's three products, in a block's `attn` or `mlp`; again: its forward runs in the backward once more."""
    part = getattr(work, phase)
    part["F"].append(Product(tokens, n, k, fp8=fp8))
    part["B"].append(Product(tokens, k, n, fp8=fp8))
    if again:
        part["B"].append(Product(tokens, n, k, fp8=fp8))
    part["W"].append(Product(n, k, tokens, columns=True, fp8=fp8))


def add_attention(work: BlockWork, model: ModelConfig, recipe: Recipe, layer: int, tokens: int, seq_len: int) -> None:
    """Norm, attention and the residual sum of block number `layer`."""
    a, dim, fp8 = model.attention, model.dim, recipe.fp8
    wide, seq = 2.0, min(seq_len, tokens)
    rows = CAST if fp8 else wide
    f, b, w = (work.attn[which] for which in "FBW")
    f.append(Pass("norm", NORM, tokens * dim * (wide + rows)))
    core = tokens * a.core_flops(seq, causal=True, layer=layer)
    if isinstance(a, MlaConfig):
        _mla(work, a, recipe, dim, tokens)
        head, backward = a.num_heads * a.v_dim, (3 * a.qk_dim + 2 * a.v_dim) / (a.qk_dim + a.v_dim)
    else:
        _gqa(work, a, recipe, dim, tokens)
        head, backward = a.num_heads * a.head_dim, 2.5
    tiles = a.num_heads * tokens / 128
    f.append(Attention(core, tiles))
    b.append(Attention(core * backward, tiles))
    linear(work, "attn", tokens, dim, head, fp8=fp8)
    f.append(Pass("norm, residual", NORM, tokens * dim * (4 * wide + (CAST if fp8 else 0.0))))
    b.append(Pass("norm backward", NORM, tokens * dim * 8.5))  # of both norms of the block
    b.append(Pass("norm backward", NORM, tokens * dim * 8.5))
    b.append(Pass("add", ADD, 2 * tokens * dim * 6))
    if fp8:
        f.append(Pass("cast", CASTS, tokens * head * (wide + CAST)))
        f.append(Pass("pack", CASTS, tokens * head * (wide + E5M6)))
        b.append(Pass("cast both", CASTS, tokens * dim * (wide + 2 * CAST)))
        b.append(Pass("unpack", CASTS, tokens * head * (wide + E5M6)))
        w.append(Pass("columns of 12 bits", CASTS, tokens * head * (CAST + E5M6)))
        w.append(Pass("norm columns", CASTS, tokens * dim * (wide + CAST)))
    elif Recompute.NORM in recipe.recompute:
        w.append(Pass("norm", NORM, 2 * tokens * dim * wide))
    b.append(Small(2))


def _mla(work: BlockWork, a: MlaConfig, recipe: Recipe, dim: int, tokens: int) -> None:
    fp8, again = recipe.fp8, Recompute.MLA_UP in recipe.recompute
    f, b, w = (work.attn[which] for which in "FBW")
    latents = a.kv_lora_rank + a.q_lora_rank
    queries, kv = a.queries, a.num_heads * (a.nope_dim + a.v_dim)
    rows = CAST if fp8 else 2.0
    first, *ups, _ = a.linears(dim)
    linear(work, "attn", tokens, *first, fp8=fp8)
    for n, k in ups:
        linear(work, "attn", tokens, n, k, fp8=fp8, again=again)
    norms = [Pass("norm", NORM, tokens * k * (2 + rows)) for _, k in ups]
    # Keys are read with their values, and written with the rotated part of all heads.
    rotations = [
        Pass("rotation", NORM, tokens * queries * 4),
        Pass("rotation", NORM, tokens * 2 * (kv + queries)),
    ]
    f += [*norms, *rotations]
    if again:
        b += [*norms, *rotations]
    b += [
        Pass("rotation", NORM, tokens * 2 * (queries + a.num_heads * a.v_dim + kv)),
        Pass("rotation", NORM, tokens * queries * 4),
        Pass("add", ADD, tokens * first[0] * 4),
        *(Pass("norm backward", NORM, tokens * k * 6.5) for _, k in ups),
    ]
    if fp8:
        widths = [n for n, _ in ups] + [first[0]]
        b += [Pass("cast both", CASTS, tokens * n * (2 + 2 * CAST)) for n in widths]
        w.append(Pass("norm columns", CASTS, tokens * latents * (2 + CAST)))
    elif Recompute.NORM in recipe.recompute:
        w.append(Pass("norm", NORM, tokens * latents * 4))


def _gqa(work: BlockWork, a: GqaConfig, recipe: Recipe, dim: int, tokens: int) -> None:
    fp8, again = recipe.fp8, Recompute.MLA_UP in recipe.recompute
    f, b = work.attn["F"], work.attn["B"]
    turned, outputs = a.queries + a.keys, a.queries + 2 * a.keys
    linear(work, "attn", tokens, outputs, dim, fp8=fp8, again=again)
    passes: list[Piece] = [Pass("rotation", NORM, tokens * turned * 4)]
    if a.qk_norm != "none":
        passes.append(Pass("norm", NORM, tokens * turned * 4))
    f += passes
    if again:
        b += passes
    b.append(Pass("rotation", NORM, tokens * turned * 4))
    if a.qk_norm != "none":
        b.append(Pass("norm backward", NORM, tokens * turned * 6))
    b.append(Pass("add", ADD, tokens * outputs * 4))  # gradients of queries, keys and values, side by side
    if fp8:
        b.append(Pass("cast both", CASTS, tokens * outputs * (2 + 2 * CAST)))
