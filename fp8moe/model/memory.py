"""Memory of a pipeline rank: parameters it holds, and bytes of activations a stage keeps for the backward."""

from collections.abc import Sequence
from dataclasses import dataclass

from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import block_parameters, count_parameters
from fp8moe.model.partition import Stage

INVERSE_RMS = 4  # bytes a token that a norm keeps beside its input


def rank_parameters(config: ModelConfig, stages: Sequence[Stage], ep: int = 1) -> int:
    """Parameters of a rank that holds `stages`; an MTP module away from the embedding brings a tied copy of it."""
    tied = any(stage.mtp for stage in stages) and not any(stage.embedding for stage in stages)
    return sum(stage_parameters(config, stage, ep) for stage in stages) + tied * config.vocab_size * config.dim


def stage_parameters(config: ModelConfig, stage: Stage, ep: int = 1) -> int:
    """Parameters of a stage on one rank: routed experts shared out over `ep` ranks, everything else whole."""
    c = config
    blocks = [*stage.layers, *([c.num_layers] if stage.mtp else [])]
    count = sum(block_parameters(c, layer) for layer in blocks)
    mixtures = sum(not c.is_dense(layer) for layer in blocks)
    e = c.experts
    routed = mixtures * (e.num_parameters(c.dim, e.num_experts) - e.num_parameters(c.dim, 0))
    count += stage.embedding * c.vocab_size * c.dim + stage.head * (c.vocab_size * c.dim + c.dim)
    if stage.mtp:
        count += count_parameters(c).mtp - block_parameters(c, c.num_layers)
    return count - routed + routed // ep


@dataclass(frozen=True)
class MicroBatch:
    """What passes a stage at once: sequences of seq_len tokens, computed and kept by `recipe`."""

    sequences: int
    seq_len: int
    recipe: Recipe = Recipe(Precision.FP8, FULL_RECOMPUTE)  # noqa: RUF009  frozen

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


def stage_activation_bytes(config: ModelConfig, stage: Stage, sizes: MicroBatch) -> float:
    """Bytes a stage keeps of one micro-batch until its weight gradients are done.

    Per block what `_block_bytes` says; for the head its input, the input's 1/rms and the gradient of its norm's output,
    which the losses' forward leaves for their backward; for the MTP module the same again, the next token's embedding
    and the final norm's output that it is joined with, the 1/rms of both and their norms' outputs unless those are
    recomputed. While the losses run there is also a chunk of logits, however many
    micro-batches are kept: `model.head_loss`.
    """
    c, wide = config, sizes.recipe.dtype.itemsize
    normed = INVERSE_RMS + (0.0 if Recompute.NORM in sizes.recipe.recompute else wide * c.dim)
    blocks = [*stage.layers, *([c.num_layers] if stage.mtp else [])]
    per_token = sum(_block_bytes(c, layer, sizes.recipe) for layer in blocks)
    per_token += (stage.head + stage.mtp) * (wide * 2 * c.dim + INVERSE_RMS)
    per_token += stage.mtp * (wide * 2 * c.dim + 2 * normed)
    return per_token * sizes.tokens


def _block_bytes(c: ModelConfig, layer: int, recipe: Recipe) -> float:
    """Bytes a token that block number `layer` keeps, experts evenly loaded and no row padding.

    Always: the residual stream before attention and before the MLP with the 1/rms of each, what attention keeps, gate
    and up of the MLP, the shared and the routed experts, the received rows with their weights and places, the router's
    logits and choice.
    Without recomputation also the norms' outputs; SwiGLU's output, but for FP8, which recomputes it always.
    """
    again, wide = recipe.recompute, recipe.dtype.itemsize
    cached = 1 + 4 / 128 if recipe.fp8 else wide  # a code and its share of a 1x128 tile's scale
    total = 2 * (wide * c.dim + INVERSE_RMS) + c.attention.kept_bytes(recipe)
    if Recompute.NORM not in again:
        total += wide * 2 * c.dim
    hidden = c.dense_hidden if c.is_dense(layer) else c.experts.hidden * (c.router.topk + c.experts.num_shared)
    total += cached * 2 * hidden
    if Recompute.SWIGLU not in again and not recipe.fp8:
        total += wide * hidden
    if not c.is_dense(layer):
        total += c.router.topk * (cached * c.dim + 4 + 20)  # a row, its weight, where it came from, belongs and lies
        total += 4 * c.experts.num_experts + 8 * c.router.topk  # logits and choice
    return total
