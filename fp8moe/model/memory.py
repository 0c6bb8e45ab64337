"""Memory of a pipeline rank by closed formulas: its weights, and bytes of activations that a stage keeps.

Weights are counted by what is kept for them (`Weights`): experts and the rest have other replicas, weights of FP8
products have quantized copies. Activations are those of one micro-batch: what each of a stage's passes keeps from its
forward to its backward, and what its weight gradients keep from there on where a schedule puts them off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fp8moe.layers.attention.context_bytes import context_deferred_bytes, context_kept_bytes
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import block_parameters, count_parameters
from fp8moe.model.partition import Stage

INVERSE_RMS = 4  # bytes a token that a norm keeps beside its input
TILE = 128  # of FP8 scales, and of the rows that a group of an expert is padded to


@dataclass(frozen=True)
class Weights:
    """How many parameters there are, by what is kept for them.

    dense, expert: all of them, by the replicas that they have. dense_matrices, expert_matrices: those of Linears, which
    have FP8 copies under FP8 and which Muon updates; the output head is none. blocks: 128x128 blocks of these.
    """

    dense: int = 0
    expert: int = 0
    dense_matrices: int = 0
    expert_matrices: int = 0
    blocks: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.dense + other.dense,
            self.expert + other.expert,
            self.dense_matrices + other.dense_matrices,
            self.expert_matrices + other.expert_matrices,
            self.blocks + other.blocks,
        )

    @property
    def total(self) -> int:
        """Parameters."""
        return self.dense + self.expert


def rank_weights(config: ModelConfig, stages: Sequence[Stage], ep: int = 1) -> Weights:
    """Parameters of a rank that holds `stages`; an MTP module away from the embedding brings a tied copy of it."""
    tied = any(stage.mtp for stage in stages) and not any(stage.embedding for stage in stages)
    total = Weights(dense=tied * config.vocab_size * config.dim)
    for stage in stages:
        total += stage_weights(config, stage, ep)
    return total


def rank_parameters(config: ModelConfig, stages: Sequence[Stage], ep: int = 1) -> int:
    """How many they are."""
    return rank_weights(config, stages, ep).total


def stage_parameters(config: ModelConfig, stage: Stage, ep: int = 1) -> int:
    """Parameters of a stage on one rank: routed experts shared out over `ep` ranks, everything else whole."""
    return stage_weights(config, stage, ep).total


def stage_weights(config: ModelConfig, stage: Stage, ep: int = 1) -> Weights:
    """The same by kind."""
    c = config
    total = Weights(dense=stage.embedding * c.vocab_size * c.dim + stage.head * (c.vocab_size * c.dim + c.dim))
    if stage.mtp:
        join = matrix_blocks(c.dim, 2 * c.dim)
        rest = count_parameters(c).mtp - block_parameters(c, c.num_layers)
        total += Weights(dense=rest, dense_matrices=2 * c.dim * c.dim, blocks=join)
    for layer in blocks_of(c, stage):
        total += _block_weights(c, layer, ep)
    return total


def _block_weights(c: ModelConfig, layer: int, ep: int) -> Weights:
    dense, hidden, experts = c.attention.linears(c.dim), c.experts.hidden, 0
    if c.is_dense(layer):
        dense += [(2 * c.dense_hidden, c.dim), (c.dim, c.dense_hidden)]
    else:
        experts = c.experts.num_experts // ep
        if shared := c.experts.num_shared * hidden:
            dense += [(2 * shared, c.dim), (c.dim, shared)]
    of_expert = [(2 * hidden, c.dim), (c.dim, hidden)]
    all_experts = c.experts.num_parameters(c.dim, c.experts.num_experts) - c.experts.num_parameters(c.dim, 0)
    routed = 0 if c.is_dense(layer) else all_experts
    return Weights(
        dense=block_parameters(c, layer) - routed,
        expert=routed // ep,
        dense_matrices=sum(n * k for n, k in dense),
        expert_matrices=experts * sum(n * k for n, k in of_expert),
        blocks=sum(matrix_blocks(*shape) for shape in dense) + experts * sum(matrix_blocks(*s) for s in of_expert),
    )


def matrix_blocks(n: int, k: int) -> int:
    """128x128 blocks, each with a scale, of a weight [n, k]."""
    return math.ceil(n / TILE) * math.ceil(k / TILE)


def blocks_of(config: ModelConfig, stage: Stage) -> list[int]:
    """Numbers of a stage's blocks in the order of its passes, the MTP module's last."""
    return [*stage.layers, *([config.num_layers] if stage.mtp else [])]


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one dispatch on a rank, in which a mixture's bytes are counted.

    experts: rows that its experts compute, padding included. arrived: those that other ranks sent, before each is
    copied to its experts. slots: entries of the maps of where a row goes, over all hops, 4 bytes each. sent: rows of
    all hops' messages.
    """

    experts: float
    arrived: float
    slots: float
    sent: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """What passes a stage at once: sequences of seq_len tokens, computed and kept by `recipe`.

    rows: of a mixture's dispatch; None: one rank, experts evenly loaded and no row padding. cp: ranks that share the
    sequences, of which this one has `tokens`.
    """

    sequences: int
    seq_len: int
    recipe: Recipe = Recipe(Precision.FP8, FULL_RECOMPUTE)  # noqa: RUF009  frozen
    rows: ExpertRows | None = None
    cp: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len // self.cp

    def expert_rows(self, topk: int) -> ExpertRows:
        """`rows`, or those of one rank."""
        copies = float(topk * self.tokens)
        return self.rows or ExpertRows(experts=copies, arrived=self.tokens, slots=copies)


def stage_activation_bytes(config: ModelConfig, stage: Stage, sizes: MicroBatch) -> float:
    """Bytes a stage keeps of one micro-batch until its weight gradients are done: those of its passes.

    While the losses run there is also a chunk of logits, however many micro-batches are kept: `model.head_loss`.
    """
    return sum(pass_bytes(config, stage, sizes))


def pass_bytes(config: ModelConfig, stage: Stage, sizes: MicroBatch) -> list[float]:
    """Bytes that each pass of a stage keeps, in the order of `model.stage.StagePasses`.

    Per block what `_block_bytes` says; nothing for the embedding; for the head its input, the input's 1/rms and the
    gradient of its norm's output, which the losses' forward leaves for their backward; for the MTP module's entrance
    the same again, the next token's embedding and the final norm's output that it is joined with, the 1/rms of both and
    their norms' outputs unless those are recomputed.
    """
    c, wide = config, sizes.recipe.dtype.itemsize
    ends = float(wide * 2 * c.dim + INVERSE_RMS) * sizes.tokens
    passes = [0.0] if stage.embedding else []
    passes += [_block_bytes(c, layer, sizes) for layer in stage.layers]
    if stage.mtp:
        normed = INVERSE_RMS + (0.0 if Recompute.NORM in sizes.recipe.recompute else wide * c.dim)
        passes += [ends + (wide * 2 * c.dim + 2 * normed) * sizes.tokens, _block_bytes(c, c.num_layers, sizes)]
    return [*passes, ends] if stage.head else passes


def rotation_bytes(config: ModelConfig, sizes: MicroBatch) -> float:
    """Bytes of the rotations of a micro-batch, which each stage makes and its passes share; cosines and sines, FP32.

    Where ranks share sequences those of all their tokens stand beside the rank's own.
    """
    whole = sizes.cp if sizes.cp > 1 else 0
    return 4.0 * config.attention.rope_dim * sizes.tokens * (1 + whole)


def deferred_bytes(config: ModelConfig, stage: Stage, sizes: MicroBatch) -> float:
    """Bytes that the weight gradients of a micro-batch keep where a schedule puts them off, behind its backward.

    Of each Linear the gradient of its output, cast along columns under FP8, and what its input's columns are made of;
    of the router the gradient of its logits; of the embedding and of the MTP module's entrance the gradient that they
    got. The losses add theirs in their forward.
    """
    c, recipe = config, sizes.recipe
    wide = recipe.dtype.itemsize
    total = sum(_block_deferred(c, layer, sizes) for layer in blocks_of(c, stage))
    total += stage.embedding * (wide * c.dim + 8) * sizes.tokens
    if stage.mtp:
        sources = 2 * _norm_source(c.dim, recipe)
        total += (sources + _columns(recipe) * c.dim + wide * c.dim + 8) * sizes.tokens
    return total


def _block_deferred(c: ModelConfig, layer: int, sizes: MicroBatch) -> float:
    recipe = sizes.recipe
    wide, cast = recipe.dtype.itemsize, _columns(recipe)
    keeps = Recompute.SWIGLU not in recipe.recompute and not recipe.fp8
    per_hidden = 2 * cast + (wide if keeps else 2 * cast)  # the gradient, and the product or what it is made of
    per_token = cast * sum(n for n, _ in c.attention.linears(c.dim)) + c.attention.input_bytes(recipe)
    per_token += context_deferred_bytes(c.attention, recipe, sizes.cp) + 2 * _norm_source(c.dim, recipe)
    if c.is_dense(layer):
        return (per_token + cast * c.dim + per_hidden * c.dense_hidden) * sizes.tokens
    rows, e = sizes.expert_rows(c.router.topk), c.experts
    per_token += 4 * e.num_experts + per_hidden * e.hidden * e.num_shared + (e.num_shared > 0) * cast * c.dim
    return per_token * sizes.tokens + (per_hidden * e.hidden + 2 * cast * c.dim + 4 * (not keeps)) * rows.experts


def _columns(recipe: Recipe) -> float:
    """Bytes of a value that a weight gradient reads: a code and its share of a 1x128 tile's scale under FP8."""
    return 1 + 4 / TILE if recipe.fp8 else recipe.dtype.itemsize


def _norm_source(dim: int, recipe: Recipe) -> float:
    """Bytes a token of what the output of a norm is made again of, and of that output where it is kept."""
    kept = 1 if Recompute.NORM in recipe.recompute else 2
    return kept * recipe.dtype.itemsize * dim + INVERSE_RMS * recipe.fp8


def _block_bytes(c: ModelConfig, layer: int, sizes: MicroBatch) -> float:
    """Bytes that block number `layer` keeps.

    Always: the residual stream before attention and before the MLP with the 1/rms of each, what attention keeps, gate
    and up of the MLP, the shared and the routed experts, the received rows with their weights and places, the router's
    logits and choice. Without recomputation also the norms' outputs; SwiGLU's output, but for FP8, which recomputes it
    always.
    """
    recipe = sizes.recipe
    again, wide, cached = recipe.recompute, recipe.dtype.itemsize, _columns(recipe)
    per_hidden = 2 * cached + (0 if Recompute.SWIGLU in again or recipe.fp8 else wide)
    per_token = 2 * (wide * c.dim + INVERSE_RMS) + c.attention.kept_bytes(recipe)
    per_token += context_kept_bytes(c.attention, recipe, sizes.cp)
    if Recompute.NORM not in again:
        per_token += wide * 2 * c.dim
    if c.is_dense(layer):
        return (per_token + per_hidden * c.dense_hidden) * sizes.tokens
    rows, e = sizes.expert_rows(c.router.topk), c.experts
    per_token += per_hidden * e.hidden * e.num_shared + 4 * e.num_experts + 8 * c.router.topk  # logits and choice
    per_row = per_hidden * e.hidden + cached * c.dim + 4 + 16  # itself, its weight, where it came from and belongs
    return per_token * sizes.tokens + per_row * rows.experts + 16 * rows.sent + 4 * rows.slots
