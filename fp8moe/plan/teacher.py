"""The teacher of a planned run (`distill.teacher`): its weights, what it says of a step, its forwards' memory and time.

A run's configuration names a path. What a plan needs of it, sizes and precision, the command reads and hands over; it
travels inside the configuration (`TaughtConfig`), so that every layout that is made of one keeps it. Refused: another
argument of each function between the command and the formulas, which a caller could forget in silence.

A rank has all of the teacher but for its experts, which lie over the run's ep ranks, with both FP8 copies under FP8 and
without gradients (`generate.open.load_model`). Its forwards come before the step's (`post.distill.taught`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.memory import rank_weights
from fp8moe.model.partition import Stage
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.forward_time import forward_seconds
from fp8moe.plan.forward_work import forward_bytes, head_bytes
from fp8moe.plan.layer_time import Sizes
from fp8moe.plan.network import Exchange
from fp8moe.plan.rates import Card
from fp8moe.train.config import TrainConfig


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's sizes, and the precision that it computes in."""

    model: ModelConfig
    recipe: Recipe


@dataclass(frozen=True)
class TaughtConfig(TrainConfig):
    """A run's configuration and its teacher, for plans alone."""

    taught_by: TeacherModel | None = None


def with_teacher(config: TrainConfig, teacher: TeacherModel | None) -> TrainConfig:
    """The configuration with what is known of its teacher; as it is where it has none."""
    if teacher is None:
        return config
    of_run = {one.name: getattr(config, one.name) for one in fields(TrainConfig)}
    return TaughtConfig(**of_run, taught_by=teacher)


def without_teacher(config: TrainConfig) -> TrainConfig:
    """The run's own configuration again."""
    if not isinstance(config, TaughtConfig):
        return config
    return TrainConfig(**{one.name: getattr(config, one.name) for one in fields(TrainConfig)})


def unplanned(config: TrainConfig) -> TrainConfig:
    """The configuration without the name of a teacher of which nothing is known."""
    return replace(config, distill=replace(config.distill, teacher=None))


def teacher_of(config: TrainConfig) -> TeacherModel | None:
    """The teacher that came with a configuration; None of a run without one."""
    found = config.taught_by if isinstance(config, TaughtConfig) else None
    assert found is not None or config.distill.teacher is None, "with_teacher(config, ...) comes first"
    return found


def teacher_bytes(teacher: TeacherModel, ep: int) -> float:
    """Its parameters on a rank, in its precision, and their FP8 blocks."""
    model = teacher.model
    whole = Stage(0, range(model.num_layers), embedding=True, head=True, mtp=model.mtp_depth > 0)
    weights = rank_weights(model, [whole], ep)
    quantized = weights.dense_matrices + weights.expert_matrices + 4 * weights.blocks
    return float(teacher.recipe.dtype.itemsize * weights.total + 2 * quantized * teacher.recipe.fp8)


def topk_bytes(config: TrainConfig) -> float:
    """Of a rank's tokens of one step: k ids and log-probabilities each, another id and the rest."""
    return 8.0 * (config.distill.topk + 1) * config.num_microbatches * config.rank_tokens


def teacher_forward_bytes(config: TrainConfig, teacher: TeacherModel, device: torch.device) -> float:
    """Of its forward on one micro-batch."""
    model, recipe, tokens = teacher.model, teacher.recipe, config.rank_tokens
    blocks = forward_bytes(model, recipe, range(model.num_layers), tokens, config.ep)
    return max(blocks, head_bytes(model, recipe, tokens, device))


def teacher_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """Of its forwards on all of a rank's micro-batches; 0 of a run without one. ConfigError for FP32, not timed."""
    teacher = teacher_of(config)
    if teacher is None:
        return 0.0
    if teacher.recipe.precision is Precision.FP32:
        raise ConfigError(
            "distill.teacher computes in FP32, which has no timed kernels: name one that computes in BF16 or FP8"
        )
    model, per_node = teacher.model, min(cluster.gpus_per_node, config.ep)
    exchange = Exchange("all_to_all", config.ep, per_node)
    sizes = Sizes(model, teacher.recipe, config.rank_tokens, config.seq_len, exchange)
    whole = Stage(0, range(model.num_layers), embedding=True, head=True, mtp=False)
    card = Card(cluster.gpu, cluster.hbm_gb_per_second * 1e9, teacher.recipe.fp8)
    return config.num_microbatches * forward_seconds(sizes, whole, card, cluster)
