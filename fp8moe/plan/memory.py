"""Memory of every pipeline rank of a run, by closed formulas: no process, no GPU, no model on any device.

A rank's bytes by kind, in `KINDS`. What lives from step to step is `train.memory.state_bytes`. Activations are the most
that the schedule's order keeps at once (`held`). Of what runs in turn and is never there together (attention, an MLP,
the losses, the optimizer) only the largest counts, under its kind; the others are in `left_out`, so that kinds add up
to the peak. Beside them stands an allowance for fragmentation (`fragmentation_bytes`). A run with a teacher and one of
GRPO have other stretches than updates (`plan.phases`): the kinds are those of the largest.

Refused: a model on the meta device, which takes seconds for a layout of 2,048 GPUs where a search asks for thousands;
and figures tuned to a run: constants are others' measurements with their source, beside each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from fp8moe.model.memory import MicroBatch, deferred_bytes, pass_bytes, rank_weights, rotation_bytes
from fp8moe.model.partition import Stage
from fp8moe.plan.communicators import GIB, communicator_bytes
from fp8moe.plan.expert_rows import expert_rows
from fp8moe.plan.graph_costs import graph_bytes
from fp8moe.plan.held import StageBytes, most_held, most_messages
from fp8moe.plan.phases import KINDS as OF_PHASES
from fp8moe.plan.phases import UPDATES, add_teacher, other_phases, policy_bytes
from fp8moe.plan.rollout_memory import noted_bytes
from fp8moe.plan.workspace import attention_work, dispatch_work, gather_work, loss_work, mlp_work, optimizer_work
from fp8moe.schedule.action import Schedule
from fp8moe.schedule.build import build_schedule
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.memory import KINDS as STATE
from fp8moe.train.memory import replicas_of, state_bytes

IN_TURN = ("attention workspace", "MLP workspace", "logits and loss", "optimizer step")
KINDS = (
    *STATE, "activations", "data", "dispatch buffers", "gather buffers", "pipeline buffers", "beside graphs", *IN_TURN,
    *OF_PHASES, "communicators", "CUDA context", "fragmentation",
)  # fmt: skip
OF_PASSES = ("activations", "dispatch buffers", "gather buffers")
PAGE = 20 * 2**20  # that PyTorch's allocator maps and unmaps at once with expandable segments, of large tensors
# Driver, kernels and library handles: 0.52 GiB measured on an H100 by pith-train's memory estimator; and cuBLAS's
# workspaces, which PyTorch makes 32 MiB a stream on Hopper, for the two streams that multiply.
CUDA_CONTEXT = 0.52 * GIB + 2 * 32 * 2**20
SATURATED = 2  # micro-batches a pipeline rank; more of them change no rank's most


@dataclass(frozen=True)
class RankMemory:
    """A pipeline rank's bytes by kind; all of `KINDS`, those without bytes included. They add up to its peak.

    left_out: kinds of `IN_TURN` that are smaller than the one counted, which is never there with them. phases: all
    bytes of each stretch of a run that has others than updates; the largest is the one counted.
    """

    pp_rank: int
    kinds: dict[str, float]
    left_out: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.kinds.values())


def rank_memory(
    config: TrainConfig, *, gpus_per_node: int = 8, on_gpu: bool = True, imbalance: float = 1.0
) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank of a resolved configuration.

    on_gpu: False for what a process on a CPU allocates for tensors: no communicators, context or allowance. imbalance:
    rows that the busiest rank's experts get, as a multiple of an even share (`parallel.max_imbalance`). Raises
    ConfigError where the configuration has no such pipeline.
    """
    schedule = schedule_of(config)
    stages = stages_of(config)
    rows = expert_rows(config, imbalance, on_gpu=on_gpu)
    sizes = MicroBatch(config.micro_batch, config.seq_len, config.recipe, rows, config.parallel.cp)
    by_stage = [stage_bytes(config, stage, sizes) for stage in stages]
    return tuple(
        _rank(config, schedule, stages, sizes, by_stage, pp_rank, gpus_per_node if on_gpu else None)
        for pp_rank in range(config.parallel.pp)
    )


def worst_rank(ranks: tuple[RankMemory, ...]) -> RankMemory:
    """The rank with the most."""
    return max(ranks, key=lambda rank: rank.total)


def stage_bytes(config: TrainConfig, stage: Stage, sizes: MicroBatch) -> StageBytes:
    """What a stage keeps of one micro-batch: its passes, the rotations that they share, weight gradients put off."""
    first, *others = pass_bytes(config.model, stage, sizes)
    rotations = rotation_bytes(config.model, sizes)
    return StageBytes((first + rotations, *others), deferred_bytes(config.model, stage, sizes))


def _most_blocks(schedule: Schedule, pp_rank: int, by_stage: list[StageBytes]) -> float:
    """Most passes of micro-batches, blocks nearly all of them, that are held at once."""
    ones = [StageBytes((1.0,) * len(stage.passes), len(stage.passes)) for stage in by_stage]
    return max(most_held(schedule, pp_rank, ones))


def fragmentation_bytes(blocks: float) -> float:
    """An allowance: a page of the allocator for each block of each micro-batch that is held at once.

    With expandable segments (`cuda_environment` sets them) free pages are unmapped where memory is short, and what
    stays lost are pages that a hole shares with its neighbours: half a page at either end of it, on average. Tensors of
    a block are made and let go together, so there is a hole for each at worst. Weights, gradients and optimizer state
    are a few buffers that are made once. pith-train's estimator allows 10 % of everything.
    """
    return blocks * PAGE


def _data_bytes(config: TrainConfig) -> int:
    """Bytes of the data of one of a rank's tokens: id, label, position and, of masked documents, their number.

    Where ranks share sequences also the ids and labels behind it, and positions of whole sequences; its experts where
    they are replayed.
    """
    masked, cp = 8 * config.data.document_mask, config.parallel.cp
    return noted_bytes(config, least=2) + (24 + masked if cp == 1 else 40 + 8 * cp + masked * cp)


def schedule_of(config: TrainConfig) -> Schedule:
    """A schedule in which every rank holds as much as in that of the configuration, of few micro-batches."""
    pp, count = config.parallel.pp, config.num_microbatches
    enough = SATURATED * pp + count % 2
    return _schedule(config.parallel.schedule, pp, min(count, max(enough, 2)))


_schedule = lru_cache(maxsize=256)(build_schedule)


def _rank(
    config: TrainConfig,
    schedule: Schedule,
    stages: tuple[Stage, ...],
    sizes: MicroBatch,
    by_stage: list[StageBytes],
    pp_rank: int,
    gpus_per_node: int | None,
) -> RankMemory:
    on_gpu = gpus_per_node is not None
    held = [stages[i] for i in sorted({stage for _, stage in schedule.held_by(pp_rank)})]
    weights = rank_weights(config.model, held, config.ep)
    kinds = dict.fromkeys(KINDS, 0.0)
    kinds |= state_bytes(weights, config.recipe, config.optimizer, replicas_of(config))
    most = most_held(schedule, pp_rank, by_stage, overlap=config.parallel.overlap)
    kinds["activations"], kinds["dispatch buffers"] = max(
        zip(most, dispatch_work(config, held, sizes), strict=True), key=sum
    )
    kinds["data"] = config.num_microbatches * sizes.tokens * _data_bytes(config) + policy_bytes(config)
    add_teacher(config, kinds)
    kinds["gather buffers"] = gather_work(config, held, sizes)
    hidden = sizes.tokens * config.model.dim * config.recipe.dtype.itemsize
    kinds["pipeline buffers"] = float(most_messages(schedule, pp_rank) * hidden)
    device = torch.device("cuda" if on_gpu else "cpu")
    update = optimizer_work(config, weights)
    if config.parallel.cuda_graphs and on_gpu:  # their pool keeps what the optimizer would else use again
        kinds["beside graphs"], update = graph_bytes(config, held, sizes, update), 0.0
    in_turn = {
        "attention workspace": attention_work(config, held, sizes),
        "MLP workspace": mlp_work(config, held, sizes),
        "logits and loss": loss_work(config, held, sizes, device),
        "optimizer step": update - sum(kinds[kind] for kind in OF_PASSES),
    }
    largest = max(in_turn, key=lambda kind: in_turn[kind])
    kinds[largest] = max(0.0, in_turn.pop(largest))
    if gpus_per_node is not None:
        kinds["communicators"] = communicator_bytes(config, pp_rank, gpus_per_node)
        kinds["CUDA context"] = CUDA_CONTEXT
        kinds["fragmentation"] = fragmentation_bytes(_most_blocks(schedule, pp_rank, by_stage))
    left_out = {kind: max(0.0, size) for kind, size in in_turn.items()}
    others = other_phases(config, stages, pp_rank, held, sizes, kinds, device)
    return _largest(pp_rank, kinds, left_out, others)


def _largest(
    pp_rank: int, update: dict[str, float], left_out: dict[str, float], others: dict[str, dict[str, float]]
) -> RankMemory:
    """The memory of the stretch that needs most, with what all of them need where there are several."""
    if not others:
        return RankMemory(pp_rank, update, left_out)
    every = {UPDATES: update, **others}
    phases = {name: sum(kinds.values()) for name, kinds in every.items()}
    largest = max(phases, key=lambda name: phases[name])
    return RankMemory(pp_rank, every[largest], left_out if largest == UPDATES else {}, phases)
