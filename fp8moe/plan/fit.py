"""Train's check before it allocates: whether every rank fits its memory, and the nearest layout that would.

On a GPU the whole formula counts (`plan.memory`): weights, optimizer state, activations, buffers and the allowance for
fragmentation, routing balanced. On a CPU the machine's processes share one memory, which other programs use too; there
only the least that a run needs is compared (`plan.machine_memory`), so that nothing that fits is refused. `plan=off`
skips both.

The nearest layout is the one with the fewest changed keys; of those the one that changes the smallest things: first how
many rollouts are sampled at once, the micro-batch, then what is computed again, then how experts and sequences are
shared out, last the pipeline. Of results, only the order of sums changes, and under FP8 the rounding of latents that
are sent.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

import torch

from fp8moe.errors import ConfigError
from fp8moe.plan.fitting import legal_layouts
from fp8moe.plan.layouts import changed
from fp8moe.plan.machine_memory import check_host
from fp8moe.plan.memory import RankMemory, rank_memory, worst_rank
from fp8moe.plan.rollout_memory import has_rollouts, sampled_sizes
from fp8moe.plan.teacher import TeacherModel, with_teacher
from fp8moe.train.config import TrainConfig

GB = 1e9
# How much a changed key disturbs, by its place: of two layouts with as many changed keys the cheaper one is nearer.
CHEAPEST_FIRST = (
    *("grpo.rollout_batch", "batch.micro_batch", "recompute", "optimizer.sharding"),
    *("parallel.ep", "parallel.cp", "parallel.schedule"),
)
COST = {key: cost for cost, key in enumerate(CHEAPEST_FIRST, 1)}


def check_fits(config: TrainConfig, local_processes: int, teacher: TeacherModel | None = None) -> None:
    """Raise ConfigError where a resolved configuration needs more memory than there is.

    local_processes: those of this machine, which share its memory on a CPU; a GPU is one process's. teacher: that of
    the configuration.
    """
    if not config.plan:
        return
    config = with_teacher(config, teacher)
    if config.device != "cpu" and torch.cuda.is_available():
        check_gpu(config, torch.cuda.get_device_properties(0).total_memory, local_processes)
    else:
        check_host(config, local_processes)


def check_gpu(config: TrainConfig, there: int, gpus_per_node: int) -> None:
    """Raise ConfigError where a rank needs more than `there`, the bytes of each GPU, with the nearest layout."""
    most = worst_of(config, gpus_per_node)
    if most.total <= there:
        return
    largest = ", ".join(
        f"{kind} {size / GB:.1f}" for kind, size in sorted(most.kinds.items(), key=lambda item: -item[1])[:3]
    )
    raise ConfigError(
        f"pipeline rank {most.pp_rank} needs {most.total / GB:.1f} GB ({largest}) and a GPU has {there / GB:.1f} GB, "
        f"{(most.total - there) / GB:.1f} GB too little: {advice(config, there, gpus_per_node)}, or plan=off to try"
    )


def advice(config: TrainConfig, there: float, gpus_per_node: int) -> str:
    """What to use in place of a resolved configuration that does not fit."""
    found = nearest_fitting(config, there, gpus_per_node)
    if found is not None:
        need = worst_of(found, gpus_per_node).total
        return f"use {shlex.join(changed(config, found))} ({need / GB:.1f} GB)"
    gpus = config.parallel.pp * config.dp
    legal = legal_layouts(config, gpus, gpus_per_node)
    return (
        f"no layout of {gpus} GPUs fits, the least needs {legal.bytes(legal.least()) / GB:.1f} GB: use more GPUs, a "
        f"smaller model or seq_len below {config.seq_len} (fp8moe plan --search says what would fit)"
    )


def worst_of(config: TrainConfig, gpus_per_node: int) -> RankMemory:
    """The pipeline rank that needs most, routing balanced."""
    return worst_rank(rank_memory(config, gpus_per_node=gpus_per_node))


def nearest_fitting(config: TrainConfig, there: float, gpus_per_node: int) -> TrainConfig | None:
    """The layout nearest to a resolved configuration's whose every rank fits into `there` bytes; None: none does.

    Where the optimizer's state is on every replica whole, layouts that share it out count too; where rollouts need
    most, fewer of them at once.
    """
    gpus = config.parallel.pp * config.dp
    tried = [config]
    if config.optimizer.sharding == "none":
        tried.append(replace(config, optimizer=replace(config.optimizer, sharding="zero1")))
    if has_rollouts(config):
        fewer = [replace(config, grpo=replace(config.grpo, rollout_batch=batch)) for batch in fewer_rows(config)]
        tried += fewer[-1:]
        if (enough := next((one for one in fewer if worst_of(one, gpus_per_node).total <= there), None)) is not None:
            return enough
    found = [
        one for base in tried for alike in legal_layouts(base, gpus, gpus_per_node).fitting(there) for one in alike
    ]
    return min(found, key=lambda one: _distance(config, one), default=None)


def fewer_rows(config: TrainConfig) -> Iterator[int]:
    """Sizes of `grpo.rollout_batch` below those that a rank decodes with, each of half as many problems, to one."""
    samples = config.grpo.samples
    problems = -(-max(one.rows for one in sampled_sizes(config)) // samples)
    while problems > 1:
        problems = -(-problems // 2)
        yield problems * samples


def _distance(before: TrainConfig, after: TrainConfig) -> tuple[float, ...]:
    keys = [setting.partition("=")[0] for setting in changed(before, after)]
    return (
        len(keys),
        sum(COST.get(key, len(COST) + 1) for key in keys),
        -after.micro_batch,
        len(after.recompute),
        abs(after.parallel.pp - before.parallel.pp),
        abs(after.ep - before.ep),
        abs(after.parallel.cp - before.parallel.cp),
    )
