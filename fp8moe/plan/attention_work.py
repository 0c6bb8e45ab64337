"""What the attention phases of a block compute, read and write: the rows of `docs/layer.md`, for any sizes.

In FP8 every product takes rows made by the pass before it and its weight gradient takes columns: of the recomputed
norms, and of attention's output kept in 12 bits. BF16 is the same with plain products and no casts. Bytes count each
tensor once; those of products are with the products (`gemm_time`).

Where `cp` ranks share sequences, what is computed before the gather stands in the phase `keys`, what need not wait for
it in `queries`. A rank's queries see as many keys as those of any other, so core attention is the whole sequences' over
cp; the keys of its two chunks are copied, and their gradients widened to all keys and added. In latent attention every
rank makes keys and values of all tokens, group by group of heads: the up projection, its gradients, the weights' among
them in the backward, and the rotation are `Shared`.

Legend: T tokens of a micro-batch, D model.
"""

from __future__ import annotations

from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.attention.context_bytes import key_heads_at_once
from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.plan.work import Attention, BlockWork, Pass, Piece, Product, Shared, Small

CAST = 1 + 4 / 128  # bytes of a value in 1x128 tiles, its scale included
E5M6 = 1.5 + 4 / 128
NORM, CASTS, ADD = "norms and rotation", "casts", "element-wise"


def linear(
    work: BlockWork,
    phase: str,
    tokens: int,
    n: int,
    k: int,
    *,
    fp8: bool,
    again: bool = False,
    cp: int = 1,
    groups: int = 1,
    ahead: str | None = None,
) -> None:
    """A Linear's three products, in a phase of a block; again: its forward runs in the backward once more.

    cp: ranks each of which multiplies the tokens of all; then weight gradients run in the backward. groups: equal parts
    of the outputs, one after the other. ahead: the phase of the forward, where that is another.
    """
    part = getattr(work, phase)
    tokens, n = tokens * cp, n // groups
    forward = [shared(Product(tokens, n, k, fp8=fp8), cp)] * groups
    getattr(work, ahead or phase)["F"] += forward
    part["B"] += [shared(Product(tokens, k, n, fp8=fp8), cp)] * groups
    if again:
        part["B"] += forward
    part["W" if cp == 1 else "B"] += [shared(Product(n, k, tokens, columns=True, fp8=fp8), cp)] * groups


def shared(piece: Product | Pass, cp: int) -> Piece:
    """A piece for the tokens of `cp` ranks, each of which computes it."""
    return Shared(piece, cp) if cp > 1 else piece


def add_attention(
    work: BlockWork, model: ModelConfig, recipe: Recipe, layer: int, tokens: int, seq_len: int, cp: int = 1
) -> None:
    """Norm, attention and the residual sum of block number `layer`. tokens: of one of cp ranks that share sequences."""
    a, dim, fp8 = model.attention, model.dim, recipe.fp8
    wide, seq = 2.0, min(seq_len, tokens * cp)
    rows = CAST if fp8 else wide
    f, b, w = (work.attn[which] for which in "FBW")
    keys = work.keys if cp > 1 else work.attn
    keys["F"].append(Pass("norm", NORM, tokens * dim * (wide + rows)))
    core = tokens * a.core_flops(seq, causal=True, layer=layer)
    if isinstance(a, MlaConfig):
        _mla(work, a, recipe, dim, tokens, cp)
        head, backward = a.num_heads * a.v_dim, (3 * a.qk_dim + 2 * a.v_dim) / (a.qk_dim + a.v_dim)
    else:
        _gqa(work, a, recipe, dim, tokens, cp)
        head, backward = a.num_heads * a.head_dim, 2.5
    tiles, groups = a.num_heads * tokens / 128, head_groups(a, recipe, tokens, cp)
    f += [Attention(core / groups, tiles / groups)] * groups
    b += [Attention(core / groups * backward, tiles / groups)] * groups
    linear(work, "attn", tokens, dim, head, fp8=fp8)
    f.append(Pass("norm, residual", NORM, tokens * dim * (4 * wide + (CAST if fp8 else 0.0))))
    keys["B"].append(Pass("norm backward", NORM, tokens * dim * 8.5))  # of both norms of the block
    b.append(Pass("norm backward", NORM, tokens * dim * 8.5))
    b.append(Pass("add", ADD, 2 * tokens * dim * 6))
    if cp > 1:
        copies, gradients = _keys_by_run(a, tokens, cp, 2 * tokens * cp // seq)
        f.append(copies)
        b += [gradients, *([copies] if Recompute.MLA_UP in recipe.recompute else [])]
    if fp8:
        f.append(Pass("cast", CASTS, tokens * head * (wide + CAST)))
        f.append(Pass("pack", CASTS, tokens * head * (wide + E5M6)))
        b.append(Pass("cast both", CASTS, tokens * dim * (wide + 2 * CAST)))
        b.append(Pass("unpack", CASTS, tokens * head * (wide + E5M6)))
        w.append(Pass("columns of 12 bits", CASTS, tokens * head * (CAST + E5M6)))
        keys["W"].append(Pass("norm columns", CASTS, tokens * dim * (wide + CAST)))
    elif Recompute.NORM in recipe.recompute:
        keys["W"].append(Pass("norm", NORM, 2 * tokens * dim * wide))
    b.append(Small(2))


def head_groups(a: MlaConfig | GqaConfig, recipe: Recipe, tokens: int, cp: int) -> int:
    """Groups of heads that run one after the other; 1 where a rank has whole sequences, or gathers keys."""
    if cp == 1 or isinstance(a, GqaConfig):
        return 1
    return a.num_heads // key_heads_at_once(a, recipe, tokens * cp)


def _keys_by_run(a: MlaConfig | GqaConfig, tokens: int, cp: int, runs: int) -> tuple[Piece, Piece]:
    """Copies of keys and values for each run, and the way back: cleared and copied as long as all keys, and summed.

    The runs of a sequence have half a chunk more keys than it has tokens, together; that half chunk is left out.
    """
    values = 2 * tokens * cp * (a.num_heads * (a.qk_dim + a.v_dim) if isinstance(a, MlaConfig) else 2 * a.keys)
    back = (runs + 2 + 3 * (runs - 1)) * values
    return shared(Pass("add", ADD, 2 * values), cp), shared(Pass("add", ADD, back), cp)


def _mla(work: BlockWork, a: MlaConfig, recipe: Recipe, dim: int, tokens: int, cp: int) -> None:
    fp8, again = recipe.fp8, Recompute.MLA_UP in recipe.recompute
    f, b, w = (work.attn[which] for which in "FBW")
    groups, (first, ahead) = head_groups(a, recipe, tokens, cp), ("keys", "queries") if cp > 1 else ("attn", "attn")
    keys, before = getattr(work, first), getattr(work, ahead)["F"]
    queries, kv = a.queries, a.num_heads * (a.nope_dim + a.v_dim)
    rows = CAST if fp8 else 2.0
    down, *up_queries, up_keys, _ = a.linears(dim)
    linear(work, first, tokens, *down, fp8=fp8)
    for n, k in up_queries:
        linear(work, "attn", tokens, n, k, fp8=fp8, again=again, groups=groups, ahead=ahead)
    linear(work, "attn", tokens, *up_keys, fp8=fp8, again=again, cp=cp, groups=groups)
    norm = {k: Pass("norm", NORM, tokens * k * (2 + rows)) for k in (a.kv_lora_rank, a.q_lora_rank)}
    # Keys are read with their values, and written with the rotated part of all heads.
    of_queries = [
        *([norm[a.q_lora_rank]] if up_queries else []),
        Pass("rotation", NORM, tokens * queries * 4),
    ]
    of_keys = shared(Pass("rotation", NORM, tokens * cp * 2 * (kv + queries)), cp)
    keys["F"].append(norm[a.kv_lora_rank])
    before += of_queries
    f.append(of_keys)
    if again:
        b += [*of_queries, of_keys]
        if cp == 1:  # rows that were gathered are kept
            b.append(norm[a.kv_lora_rank])
    b += [
        shared(Pass("rotation", NORM, tokens * cp * 2 * (queries + a.num_heads * a.v_dim + kv)), cp),
        Pass("rotation", NORM, tokens * queries * 4),
        *(Pass("norm backward", NORM, tokens * k * 6.5) for _, k in up_queries),
    ]
    keys["B"] += [
        Pass("add", ADD, tokens * down[0] * 4),
        Pass("norm backward", NORM, tokens * a.kv_lora_rank * 6.5),
    ]
    if fp8:
        b += [Pass("cast both", CASTS, tokens * n * (2 + 2 * CAST)) for n, _ in up_queries]
        b.append(shared(Pass("cast both", CASTS, tokens * cp * kv * (2 + 2 * CAST)), cp))
        keys["B"].append(Pass("cast both", CASTS, tokens * down[0] * (2 + 2 * CAST)))
    latents = a.q_lora_rank + (a.kv_lora_rank if cp == 1 else 0)
    if fp8 and latents:
        w.append(Pass("norm columns", CASTS, tokens * latents * (2 + CAST)))
    elif Recompute.NORM in recipe.recompute:
        w.append(Pass("norm", NORM, tokens * latents * 4))
    if fp8 and cp > 1:
        b += [shared(Pass("columns of rows", CASTS, tokens * cp * a.kv_lora_rank * 2 * CAST), cp)] * groups


def _gqa(work: BlockWork, a: GqaConfig, recipe: Recipe, dim: int, tokens: int, cp: int) -> None:
    fp8, again = recipe.fp8, Recompute.MLA_UP in recipe.recompute
    first, keys = ("keys", work.keys) if cp > 1 else ("attn", work.attn)
    turned, outputs = a.queries + a.keys, a.queries + 2 * a.keys
    linear(work, first, tokens, outputs, dim, fp8=fp8)
    passes: list[Piece] = [Pass("rotation", NORM, tokens * turned * 4)]
    if a.qk_norm != "none":
        passes.append(Pass("norm", NORM, tokens * turned * 4))
    keys["F"] += passes
    if again:
        work.attn["B"] += [Product(tokens, outputs, dim, fp8=fp8), *passes]
    b = keys["B"]
    b.append(Pass("rotation", NORM, tokens * turned * 4))
    if a.qk_norm != "none":
        b.append(Pass("norm backward", NORM, tokens * turned * 6))
    b.append(Pass("add", ADD, tokens * outputs * 4))  # gradients of queries, keys and values, side by side
    if fp8:
        b.append(Pass("cast both", CASTS, tokens * outputs * (2 + 2 * CAST)))
