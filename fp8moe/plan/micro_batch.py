"""The micro-batch of a run on GPUs where none is set: the largest that fits, by the memory formulas.

`train.batch` alone would take a rank's whole share of the batch, which only a CPU's memory follows. Every rank chooses
it for itself, from the configuration and the memory of its GPU in whole GB, so that cards of one kind agree; on cards
of several kinds set batch.micro_batch. Experts are counted with the rows that `parallel.max_imbalance` allows, or
IMBALANCE times an even share: routing is uneven at the start of a run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision
from fp8moe.model.config import FP8_MULTIPLE
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.teacher import TeacherModel, with_teacher, without_teacher
from fp8moe.schedule.build import microbatches
from fp8moe.train.batch import micro_batches
from fp8moe.train.config import TrainConfig

IMBALANCE = 1.5
GB = 10**9


@dataclass(frozen=True)
class Chosen:
    """A configuration whose micro-batch is set, and the sentence that says why; None where nothing was chosen."""

    config: TrainConfig
    sentence: str | None


def choose_micro_batch(
    config: TrainConfig, world_size: int, gpus_per_node: int, teacher: TeacherModel | None = None
) -> Chosen:
    """`config` with the micro-batch that fits this machine's GPU; as it is where that is set, or no GPU is used."""
    if config.batch.micro_batch is not None or config.device == "cpu" or not torch.cuda.is_available():
        return Chosen(config, None)
    there = torch.cuda.get_device_properties(0).total_memory // GB * GB
    chosen = choose_for(with_teacher(config, teacher), world_size, gpus_per_node, there)
    return dataclasses.replace(chosen, config=without_teacher(chosen.config))


def choose_for(config: TrainConfig, world_size: int, gpus_per_node: int, there: int) -> Chosen:
    """The same for GPUs of `there` bytes. Where none fits it is the smallest; what else is wrong `resolve` says."""
    parallel, experts = config.parallel, config.model.experts.num_experts
    dp, cp = world_size // parallel.pp, parallel.cp
    ep = parallel.ep or math.gcd(dp // cp, experts)
    if dp < 1 or dp % (cp * ep) or experts % ep or config.seq_len % (2 * cp):
        return Chosen(config, None)
    least, multiple = microbatches(parallel.schedule, parallel.pp)
    sizes = [
        size
        for size in micro_batches(config.batch, dp // cp, least=least, multiple=multiple)
        if _suits(config, dp, size)
    ]
    filled = dataclasses.replace(parallel, dp=dp, ep=ep)
    imbalance = parallel.max_imbalance or IMBALANCE
    for size in reversed(sizes):
        candidate = dataclasses.replace(
            config, parallel=filled, batch=dataclasses.replace(config.batch, micro_batch=size)
        )
        try:
            need = worst_rank(rank_memory(candidate, gpus_per_node=gpus_per_node, imbalance=imbalance)).total
        except ConfigError:  # no such pipeline
            return Chosen(config, None)
        if need <= there or size == sizes[0]:
            fits = "the largest that fits" if need <= there else "the smallest, which does not fit"
            said = f"batch.micro_batch={size}: {fits} a GPU of {there // GB} GB by the formulas ({need / GB:.3g} GB)"
            return Chosen(dataclasses.replace(config, batch=candidate.batch), said)
    return Chosen(config, None)


def _suits(config: TrainConfig, dp: int, size: int) -> bool:
    """Whether validation and FP8 take micro-batches of that size, as `resolve` asks."""
    fp8 = config.precision.mode is Precision.FP8
    cp = config.parallel.cp
    tokens = size * config.seq_len // cp
    return config.validation.samples % (dp // cp * size) == 0 and (not fp8 or tokens % FP8_MULTIPLE == 0)
