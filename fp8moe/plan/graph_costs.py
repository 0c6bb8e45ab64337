"""What CUDA graphs of a micro-batch (`parallel.cuda_graphs`) leave to the host and add: launches, copies, memory.

On one rank the graphs hold every launch. Where ranks share experts they are divided at each message
(`parallel.dispatch.captured`): the messages' own launches stay the host's, and tensors pass by way of buffers that lie
still, one for each that a verb is given or gives, the same for all layers. What is given is copied once, by a graph;
what arrives twice, by the host into its buffer and by the next graph out of it. A replay's own 10 microseconds are left
out.

The graphs' pool keeps activations and workspace from step to step, so an update and validation's forwards, of which the
larger counts, have memory of their own.

Legend: T tokens, R rows of a rank's experts, D model, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fp8moe.layers.recipe import Precision
from fp8moe.model.memory import TILE, MicroBatch
from fp8moe.model.partition import Stage
from fp8moe.plan.expert_rows import expert_rows
from fp8moe.plan.forward_work import forward_bytes, head_bytes
from fp8moe.plan.rates import added, message_launches, parts_of
from fp8moe.plan.stage_time import StageTime
from fp8moe.plan.work import Pass
from fp8moe.train.config import TrainConfig

COPIES = "copies for messages"
COPY_LAUNCHES = 0.1  # of the host's time of a launch: PyTorch's own


def passed(config: TrainConfig, rows: float) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Bytes of the tensors of one layer's messages by F and B: those that are given, and those that arrive.

    rows: R of a dispatch.
    """
    dim, topk, tokens = config.model.dim, config.model.router.topk, config.rank_tokens
    wide = config.recipe.dtype.itemsize

    def sent(count: float) -> tuple[float, ...]:
        """Rows as they travel: under FP8 with a scale a tile."""
        fp8 = config.precision.mode is Precision.FP8
        return (count * dim, count * dim / TILE * 4) if fp8 else (count * dim * wide,)

    offsets = 4.0 * (config.model.experts.num_experts // config.ep + 1)
    of_dispatch = (*sent(tokens), tokens * topk * 8.0, tokens * topk * 4.0), (*sent(rows), rows * 4.0, offsets)
    of_combine = (rows * dim * wide,), (tokens * dim * wide,)
    back_combine = (tokens * dim * wide,), sent(rows)
    back_dispatch = (rows * dim * wide, rows * 4.0), (tokens * dim * wide, tokens * topk * 4.0)
    return {
        "F": (of_dispatch[0] + of_combine[0], of_dispatch[1] + of_combine[1]),
        "B": (back_combine[0] + back_dispatch[0], back_combine[1] + back_dispatch[1]),
    }


def replayed(config: TrainConfig, stage: Stage, time: StageTime, hops: int) -> StageTime:
    """The times of a stage whose micro-batches are graphs. hops: of a row to its experts."""
    none: dict[str, float] = dict.fromkeys("FBW", 0.0)
    mixtures = sum(not config.model.is_dense(layer) for layer in stage.layers)
    mixtures += stage.mtp and config.model.has_experts
    if config.ep == 1 or not mixtures:
        return replace(time, launches=none)
    launches, ends = {**none}, dict(time.ends)
    of_messages = message_launches(hops, exact=False)
    for part, (given, arrive) in passed(config, expert_rows(config).experts).items():
        moved = 2 * mixtures * (sum(given) + 2 * sum(arrive))
        launches[part] = mixtures * (of_messages[part] + COPY_LAUNCHES * len(arrive))
        ends[part] = added(ends[part], parts_of([Pass("add", COPIES, moved)], time.card))
    return replace(time, launches=launches, ends=ends)


def graph_bytes(config: TrainConfig, held: Sequence[Stage], sizes: MicroBatch, update: float) -> float:
    """Memory of a rank's graphs beside a micro-batch's own. update: what the optimizer's update takes."""
    layers = [layer for stage in held for layer in stage.layers]
    validation = max(
        forward_bytes(config.model, config.recipe, layers, sizes.tokens, config.ep),
        head_bytes(config.model, config.recipe, sizes.tokens, torch.device("cuda")),
    )
    beside = max(update, validation)
    if config.ep == 1 or all(config.model.is_dense(layer) for layer in layers):
        return beside
    both = passed(config, sizes.expert_rows(config.model.router.topk).experts).values()
    return beside + sum(sum(given) + sum(arrive) for given, arrive in both)
