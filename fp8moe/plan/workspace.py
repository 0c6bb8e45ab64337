"""Memory that a rank takes while it computes and lets go again: of attention, an MLP, messages, the losses, an update.

Formulas of what the code allocates on a GPU beside what a micro-batch keeps, each at its largest, which is in the
backward. `tests/fake_cuda/test_workspace.py` holds them against the allocations of the real launchers.

Legend: T tokens, R rows of experts, N and S rows that arrive and are sent, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8moe.kernels.fp8 import E4M3
from fp8moe.kernels.message_layout import MessageLayout
from fp8moe.layers.attention.context_bytes import context_message_bytes, context_work_bytes
from fp8moe.model.head_loss import chunk_tokens
from fp8moe.model.memory import TILE, MicroBatch, Weights, blocks_of
from fp8moe.model.partition import Stage
from fp8moe.parallel.dispatch.deep_ep import NVLINK_BYTES, RANKS_PER_NODE, RDMA_BYTES
from fp8moe.parallel.sharding.buckets import BUCKET
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import replicas_of
from fp8moe.train.optimizer.muon_step import BATCH_VALUES

MUON_BYTES = 14  # for each value that is multiplied together (`muon_step`)


def attention_work(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch) -> float:
    """Of a block's attention: what the layer says, the residual stream's and its norm's gradients, a norm's output.

    Where ranks share sequences the layer holds keys and values of all their tokens, for some of the heads.
    """
    c, wide = config.model, sizes.recipe.dtype.itemsize
    if not any(blocks_of(c, stage) for stage in held):
        return 0.0
    of_layer = context_work_bytes(c.attention, sizes.recipe, sizes.cp, sizes.tokens * sizes.cp)
    return sizes.tokens * (of_layer + 3 * wide * c.dim)


def gather_work(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch) -> float:
    """Of a layer's messages to the ranks that share its sequences, in flight beside another's compute."""
    if not any(blocks_of(config.model, stage) for stage in held):
        return 0.0
    return sizes.tokens * context_message_bytes(config.model.attention, sizes.recipe, sizes.cp)


def mlp_work(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch) -> float:
    """Of the largest MLP: gradients of its output, its hidden features and its input; under FP8 their casts.

    Rows of experts arrive in FP8 and are cast along columns later; those of a dense MLP are cast both ways at once. The
    backward of shared experts has gone before: beside it lie the gradient of their input, and what their weight
    gradients read.
    """
    c, recipe = config.model, sizes.recipe
    wide, cast = recipe.dtype.itemsize, 1 + 4 / TILE

    def of(rows: float, hidden: int, casts: int) -> float:
        of_output = casts * cast * c.dim if recipe.fp8 else wide * c.dim
        of_product = 2 * cast * 2 * hidden if recipe.fp8 else wide * 2 * hidden
        return rows * (of_output + wide * (c.dim + hidden) + of_product)

    largest = 0.0
    for layer in (layer for stage in held for layer in blocks_of(c, stage)):
        if c.is_dense(layer):
            size = of(sizes.tokens, c.dense_hidden, 2)
        else:
            size = of(sizes.expert_rows(c.router.topk).experts, c.experts.hidden, 1)
            if shared := c.experts.num_shared * c.experts.hidden:
                read = cast * (c.dim + 2 * shared) if recipe.fp8 else wide * 2 * shared
                size += sizes.tokens * (wide * c.dim + read)
        largest = max(largest, size)
    return largest


def dispatch_work(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch) -> tuple[float, float]:
    """Of the messages to experts in flight, S rows sent and N arrived: of one pass alone, and of an overlapped pair.

    The most is in dispatch's backward: partial sums of the N rows beside the weights' gradients, the S rows that come
    back, and their sums. In a pair the other pass's rows are beside them, under FP8 in FP8.
    """
    c, recipe = config.model, sizes.recipe
    has_experts = any(not c.is_dense(layer) for stage in held for layer in blocks_of(c, stage))
    if config.ep == 1 or not has_experts:
        return 0.0, 0.0
    rows, wide = sizes.expert_rows(c.router.topk), recipe.dtype.itemsize
    buffers = 0.0
    if config.parallel.dispatcher == "deep_ep":
        buffers = NVLINK_BYTES + (RDMA_BYTES if config.ep > RANKS_PER_NODE else 0)
    alone = buffers + (rows.sent + rows.arrived + sizes.tokens) * wide * c.dim
    row = MessageLayout(E4M3 if recipe.fp8 else recipe.dtype, c.dim, c.router.topk).row_bytes
    return alone, alone + (rows.sent + rows.arrived) * row


def loss_work(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch, device: torch.device) -> float:
    """Of the losses: a chunk of logits and its gradient of the input, the output of the norm; with MTP of both norms.

    On a CPU the chunk has an FP32 copy. A teacher at another temperature than 1 has a chunk of its own.
    """
    c, recipe = config.model, sizes.recipe
    if not any(stage.head for stage in held):
        return 0.0
    wide = recipe.dtype.itemsize
    chunk = min(chunk_tokens(sizes.tokens, c.vocab_size, recipe.dtype, device), sizes.tokens)
    copied = 4 if device.type == "cpu" and wide < 4 else 0
    normed, logits = 1 + any(stage.mtp for stage in held), chunk * c.vocab_size * wide
    if config.distill.has_two_softmaxes:
        logits *= 2
    return float(logits + chunk * (c.vocab_size * copied + wide * c.dim) + normed * sizes.tokens * wide * c.dim)


def optimizer_work(config: TrainConfig, weights: Weights) -> float:
    """Of an update: nothing under AdamW, whose kernel works in place; a batch of matrices under Muon.

    DeepSpeed keeps the FP32 gradients of this rank's part and reduces through a bucket.
    """
    optimizer, replicas = config.optimizer, replicas_of(config)
    if optimizer.sharding == "deepspeed":
        return 4.0 * (weights.dense / replicas[False] + weights.expert / replicas[True] + min(BUCKET, weights.total))
    if optimizer.kind != "muon":
        return 0.0
    c = config.model
    shapes = [
        *c.attention.linears(c.dim),
        (c.dim, max(c.dense_hidden, c.experts.hidden * max(1, c.experts.num_shared))),
    ]
    return float(MUON_BYTES * max(BATCH_VALUES, *(n * k for n, k in shapes)))
