"""Settings of GRPO with which sampling is predicted to be faster: CUDA graphs of its forwards, and more rows at once.

A token's time hardly depends on how many rows go on together while the host's launches bind it, or the weights' bytes;
caches grow with them. So rows are doubled as long as they fit with ROOM and bring GAIN; those of one problem at least,
and at most what a rank has of a batch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fp8moe.plan.cluster import Cluster
from fp8moe.plan.faster import GAIN, ROOM
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.plan_text import GB
from fp8moe.plan.prediction import Prediction, memory_of
from fp8moe.plan.rollout_memory import has_rollouts, rollout_sizes
from fp8moe.plan.rollout_time import rollout_time
from fp8moe.plan.schedule_tables import table
from fp8moe.train.config import TrainConfig


@dataclass(frozen=True)
class FasterRollouts:
    """The settings that change, seconds of a batch's sampling, tokens that a GPU samples a second, the worst rank."""

    settings: tuple[str, ...]
    seconds: float
    tokens_per_second_per_gpu: float
    bytes: float


def faster_rollouts(found: Prediction, mean_tokens: float) -> tuple[FasterRollouts, ...]:
    """Changes that bring more the more there are of them; none where the plan does not fit, or a server samples."""
    if not found.fits or not has_rollouts(found.config):
        return ()
    least = rollout_time(found.config, found.cluster, 0.0, mean_tokens).sampling
    shown: list[FasterRollouts] = []
    for settings, config in _changes(found.config):
        size = worst_rank(rank_memory(config, gpus_per_node=found.cluster.gpus_per_node)).total
        if size > memory_of(found.cluster) * (1 - ROOM):
            break
        time = rollout_time(config, found.cluster, 0.0, mean_tokens)
        speed = time.tokens_per_second_per_gpu
        if speed is None or time.sampling * (1 + GAIN) > least:
            continue
        least = time.sampling
        if shown and len(shown[-1].settings) == len(settings):
            shown.pop()
        shown.append(FasterRollouts(settings, time.sampling, speed, size))
    return tuple(shown)


def _changes(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], TrainConfig]]:
    """Graphs, then more and more rows."""
    settings: tuple[str, ...] = ()
    if not config.grpo.cuda_graphs:
        config, settings = replace(config, grpo=replace(config.grpo, cuda_graphs=True)), ("grpo.cuda_graphs=true",)
        yield settings, config
    while (sizes := rollout_sizes(config)).rounds > 1:
        batch = 2 * sizes.rows
        config = replace(config, grpo=replace(config.grpo, rollout_batch=batch))
        yield (*settings, f"grpo.rollout_batch={batch}"), config


def faster_rollouts_text(now: float, found: tuple[FasterRollouts, ...], cluster: Cluster) -> str:
    """A table, beside sampling that takes `now` seconds a batch; nothing where none was found."""
    if not found:
        return ""
    rows = [
        (
            shlex.join(one.settings),
            f"{one.tokens_per_second_per_gpu:,.0f}",
            f"{now / one.seconds:.2f}x",
            f"{one.bytes / GB:.1f}",
        )
        for one in found
    ]
    header = ("change", "tokens/s/GPU", "of now's", f"GB of {cluster.memory_gb:g}")
    return "\n".join(["sampling that is faster by prediction:", table(header, rows)])


def faster_rollouts_json(found: tuple[FasterRollouts, ...]) -> list[dict[str, Any]]:
    """Every figure by its name."""
    return [{**vars(one), "settings": list(one.settings)} for one in found]
