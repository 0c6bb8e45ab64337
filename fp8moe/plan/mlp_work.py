"""What a block's MLP computes, reads and writes: router, fan-out to experts, experts, shared experts, their sums.

Routing is taken as even: every expert receives tokens x topk / experts, those of all ranks that share the experts
counted. `imbalance` multiplies the rows of a rank.

Legend: T tokens of a micro-batch, D model, F hidden, R rows of a rank's experts.
"""

from __future__ import annotations

from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.plan.attention_work import ADD, CAST, CASTS, linear
from fp8moe.plan.work import BlockWork, Pass, Piece, Product, Small

SWIGLU, PERMUTE = "SwiGLU", "permutation"


def swiglu(work: BlockWork, rows: float, hidden: int, recipe: Recipe, phase: str = "mlp") -> None:
    """SwiGLU of `rows` rows, its backward, and what the weight gradient of `down` reads of it."""
    f, b, w = (getattr(work, phase)[which] for which in "FBW")
    if recipe.fp8:
        f.append(Pass("swiglu", SWIGLU, rows * hidden * (4 + 3 * CAST)))
        b.append(Pass("swiglu backward", SWIGLU, rows * hidden * (2 + 6 * CAST)))
        w.append(Pass("swiglu columns", SWIGLU, rows * hidden * 3 * CAST))
        return
    f.append(Pass("swiglu", SWIGLU, rows * hidden * 6))
    b.append(Pass("swiglu", SWIGLU, rows * hidden * 10))
    if Recompute.SWIGLU in recipe.recompute:
        w.append(Pass("swiglu", SWIGLU, rows * hidden * 6))


def _dense(work: BlockWork, phase: str, dim: int, hidden: int, recipe: Recipe, tokens: int) -> None:
    linear(work, phase, tokens, 2 * hidden, dim, fp8=recipe.fp8)
    linear(work, phase, tokens, dim, hidden, fp8=recipe.fp8)
    swiglu(work, tokens, hidden, recipe, phase)
    _, b, w = (getattr(work, phase)[which] for which in "FBW")
    if recipe.fp8:
        b.append(Pass("cast both", CASTS, tokens * dim * (2 + 2 * CAST)))
        w.append(Pass("norm columns", CASTS, tokens * dim * (2 + CAST)))
    elif Recompute.NORM in recipe.recompute:
        w.append(Pass("norm", CASTS, tokens * dim * 4))


def _experts(work: BlockWork, model: ModelConfig, recipe: Recipe, tokens: int, ep: int, imbalance: float) -> None:
    dim, hidden, fp8 = model.dim, model.experts.hidden, recipe.fp8
    local = model.experts.num_experts // ep
    each = max(1, round(tokens * ep * model.router.topk * imbalance / model.experts.num_experts))
    rows = each * local
    arrived = min(rows, tokens * ep)  # each of them once, before the fan-out to the experts of this rank
    f, b, w = (work.mlp[which] for which in "FBW")
    for n, k in ((2 * hidden, dim), (dim, hidden)):
        f.append(Product(each, n, k, groups=local, fp8=fp8, grouped=True))
        b.append(Product(each, k, n, groups=local, fp8=fp8, grouped=True))
        w.append(Product(n, k, each, groups=local, columns=True, fp8=fp8, grouped=True))
    swiglu(work, rows, hidden, recipe)
    sent = CAST if fp8 else 2.0
    f.append(Pass("permute", PERMUTE, (arrived + rows) * dim * sent))
    f.append(Pass("unpermute", PERMUTE, (arrived + rows) * dim * 2))
    b.append(Pass("permute", PERMUTE, arrived * dim * (sent if ep > 1 else 2.0) + rows * dim * sent))
    b.append(Pass("unpermute", PERMUTE, (arrived + rows) * dim * 2))
    if fp8:
        w.append(Pass("columns of rows", CASTS, 2 * rows * dim * 2 * CAST))


def add_mlp(
    work: BlockWork, model: ModelConfig, recipe: Recipe, layer: int, tokens: int, ep: int, imbalance: float
) -> None:
    """The MLP of block number `layer`, dense or a mixture of experts."""
    dim = model.dim
    if model.is_dense(layer):
        _dense(work, "mlp", dim, model.dense_hidden, recipe, tokens)
        work.attn["F"].append(Pass("add", ADD, tokens * dim * 6))
        return
    gate = model.experts.num_experts
    router: list[Piece] = [Product(tokens, gate, dim), Small(11)]
    work.attn["F"] += router
    work.attn["B"] += [Product(tokens, dim, 2 * gate), Small(9)]
    work.attn["W"] += [Product(gate, dim, tokens, columns=True), Product(gate, dim, tokens, columns=True)]
    _experts(work, model, recipe, tokens, ep, imbalance)
    sums = 2 if model.experts.num_shared else 1
    work.attn["F"].append(Pass("add", ADD, sums * tokens * dim * 6))
    if model.experts.num_shared:
        _dense(work, "shared", dim, model.experts.num_shared * model.experts.hidden, recipe, tokens)
