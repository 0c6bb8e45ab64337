"""What a rank's memory holds outside of updates: while a teacher reads a step, while a run of GRPO samples and scores.

What lives from step to step is always there; of the rest, an update's activations and buffers and those of these
stretches are never there together, so a rank's peak is that of the largest stretch.

    a teacher's forwards   its top k of the step's tokens, one forward's workspace                `plan.teacher`
    log-probabilities      data of a whole batch of rollouts, one forward's workspace; old policy, then reference
    rollouts               caches and what a token takes beside them                              `plan.rollout_memory`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fp8moe.model.memory import MicroBatch
from fp8moe.model.partition import Stage
from fp8moe.plan.forward_work import forward_bytes, head_bytes
from fp8moe.plan.rollout_memory import (
    cached_bytes,
    has_rollouts,
    is_policy,
    sampled_sizes,
    sampling_stages,
    sampling_work,
)
from fp8moe.plan.teacher import teacher_bytes, teacher_forward_bytes, teacher_of, topk_bytes
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import KINDS as STATE

UPDATES, TEACHER, SCORING, ROLLOUTS = "updates", "teacher's forwards", "log-probabilities", "rollouts"
KINDS = ("teacher", "teacher's top k", "forward workspace", "rollout caches", "rollout workspace")
ALWAYS = (*STATE, "teacher", "communicators", "CUDA context", "fragmentation")
POLICY_VALUES = 4  # FP32 values a token that an update reads beside its batch; one more with a reference


def add_teacher(config: TrainConfig, kinds: dict[str, float]) -> None:
    """What an update holds of a teacher."""
    teacher = teacher_of(config)
    if teacher is not None:
        kinds["teacher"], kinds["teacher's top k"] = teacher_bytes(teacher, config.ep), topk_bytes(config)


def policy_bytes(config: TrainConfig) -> float:
    """Advantages, shares and log-probabilities of a rank's tokens of one update; 0 of a run that is not GRPO."""
    if not is_policy(config):
        return 0.0
    return 4.0 * (POLICY_VALUES + (config.grpo.kl > 0)) * config.num_microbatches * config.rank_tokens


def other_phases(
    config: TrainConfig,
    stages: tuple[Stage, ...],
    pp_rank: int,
    held: Sequence[Stage],
    sizes: MicroBatch,
    update: Mapping[str, float],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Bytes by kind of each stretch of a rank beside its updates, whose bytes are `update`; nothing of most runs."""
    base = {kind: update[kind] if kind in ALWAYS else 0.0 for kind in update}
    data = update["data"] - policy_bytes(config)
    found = {}
    teacher = teacher_of(config)
    if teacher is not None:
        found[TEACHER] = base | {
            "data": data / config.num_microbatches,
            "teacher's top k": 2 * update["teacher's top k"],  # the last step's are kept until these are whole
            "forward workspace": teacher_forward_bytes(config, teacher, device),
        }
    if is_policy(config):
        layers = [layer for stage in held for layer in stage.layers]
        work = forward_bytes(config.model, config.recipe, layers, sizes.tokens, config.ep)
        if any(stage.head for stage in held):
            work = max(work, head_bytes(config.model, config.recipe, sizes.tokens, device))
        kept = 4.0 * config.num_microbatches * sizes.tokens  # the log-probabilities themselves
        found[SCORING] = base | {
            "data": config.grpo.minibatches * (data + kept) + policy_bytes(config),
            "pipeline buffers": update["pipeline buffers"],
            "forward workspace": work,
        }
    if has_rollouts(config):
        here = sampling_stages(config, stages, pp_rank)
        rounds = sampled_sizes(config)
        both = [(cached_bytes(config, here, one), sampling_work(config, here, one, device)) for one in rounds]
        caches, work = max(both, key=sum)
        of_last = policy_bytes(config)  # the last update's, which are kept until the next one's are made
        found[ROLLOUTS] = base | {"data": of_last, "rollout caches": caches, "rollout workspace": work}
    return found
