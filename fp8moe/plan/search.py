"""The fastest layouts of a configuration that fit a cluster's GPUs, and what would make it fit where none does.

Those that fit (`plan.fitting`) are ranked by tokens a second, equal ones by memory. The schedule is simulated for those
alone that may be among the fastest, the most promising first: no layout is faster than its work without waits
(`step_time.least_seconds`), nor than the same layout with less computed again, and the search ends where no bound is
below the last of the fastest. A brute-force search over a small cluster finds the same (`tests/plan/test_search.py`).
"""

from __future__ import annotations

import heapq
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fp8moe.errors import ConfigError
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.fitting import Layouts, key_of, legal_layouts
from fp8moe.plan.layouts import KEYS, changed
from fp8moe.plan.plan_text import GB, layout_words
from fp8moe.plan.prediction import memory_of
from fp8moe.plan.rollout_memory import has_rollouts
from fp8moe.plan.step_time import StepTime, least_seconds, step_time
from fp8moe.train.config import TrainConfig

# What torch reports as the memory of Hopper GPUs of 64, 80, 96 and 141 GB, in GB of 1e9 bytes.
HOPPERS = (68.0, 85.0, 101.0, 150.0)


@dataclass(frozen=True)
class Ranked:
    """A layout that fits, resolved, its step, and the bytes that its worst pipeline rank needs."""

    config: TrainConfig
    time: StepTime
    bytes: float


@dataclass(frozen=True)
class Search:
    """best: the fastest first. fit: how many layouts fit. smaller: one sentence on GPUs of the next smaller memory."""

    best: tuple[Ranked, ...]
    legal: int
    fit: int
    smaller: str


def search(config: TrainConfig, cluster: Cluster, count: int = 5) -> Search:
    """The `count` fastest layouts of a configuration, which need not be resolved.

    Raises ConfigError where no layout is legal; where none fits `best` is empty.
    """
    found = legal_layouts(config, cluster.gpus, cluster.gpus_per_node)
    if not found.count:
        raise ConfigError(
            f"no layout of {cluster.gpus} GPUs is legal for batch.sequences={config.batch.sequences}: use a multiple "
            f"of {cluster.gpus}"
        )
    fit = found.fitting(memory_of(cluster))
    best = fastest(found, fit, cluster, count)
    smaller = smaller_memory(found, best[0], cluster) if best else fits_nowhere(config, found, cluster)
    return Search(best, found.count, sum(map(len, fit)), smaller)


def fastest(found: Layouts, fit: Sequence[Sequence[TrainConfig]], cluster: Cluster, count: int) -> tuple[Ranked, ...]:
    """The `count` layouts with most tokens a second of those that fit, given as `Layouts.fitting` does."""
    waiting: list[tuple[float, int, TrainConfig, Sequence[TrainConfig]]] = []
    seen = set()

    def wait(bound: float, config: TrainConfig, alike: Sequence[TrainConfig]) -> None:
        if key_of(config) not in seen:
            seen.add(key_of(config))
            heapq.heappush(waiting, (bound, len(seen), config, alike))

    for alike in fit:
        for config in alike:
            if not any(set(one.recompute) < set(config.recompute) for one in alike):
                wait(least_seconds(config, cluster), config, alike)
    best: list[Ranked] = []
    while waiting and (len(best) < count or waiting[0][0] * (1 - 1e-9) <= best[-1].time.seconds):
        _, _, config, alike = heapq.heappop(waiting)
        time = step_time(config, cluster)
        best.append(Ranked(config, time, found.bytes(config)))
        best = sorted(best, key=lambda one: (one.time.seconds, one.bytes))[:count]
        for more in alike:
            if set(more.recompute) > set(config.recompute):
                wait(time.seconds, more, alike)
    return tuple(best)


def paste(
    config: TrainConfig, settings: Sequence[str], best: TrainConfig, cluster: Cluster, command: str = "train"
) -> str:
    """The command that trains in that layout. settings: the run's own, which stay but for the layout's keys."""
    keys = changed(config, best, always=KEYS)
    taken = {key.partition("=")[0] for key in keys}
    kept = [setting for setting in settings if setting.partition("=")[0].lstrip("+") not in taken]
    nproc = ["--nproc", str(cluster.gpus)] if cluster.nodes == 1 and cluster.gpus > 1 else []
    return shlex.join(["fp8moe", command, *nproc, *kept, *keys])


def smaller_memory(found: Layouts, best: Ranked, cluster: Cluster) -> str:
    """One sentence: what the same number of GPUs with the next smaller memory could do."""
    sizes = [size for size in HOPPERS if size < cluster.memory_gb - 1]
    least = found.least()
    needs = f"the least that any layout needs is {found.bytes(least) / GB:.1f} GB ({layout_words(least)})"
    if not sizes:
        return f"no Hopper GPU has less memory; {needs}"
    fit = found.fitting(sizes[-1] * GB)
    if not fit:
        return f"GPUs of {sizes[-1]:g} GB, the next smaller, would not do: {needs}"
    (there,) = fastest(found, fit, cluster, 1)
    before, after = best.time.tokens_per_second_per_gpu, there.time.tokens_per_second_per_gpu
    how = f"{1 - after / before:.1%} slower" if after < before * 0.9995 else "as fast"
    return (
        f"GPUs of {sizes[-1]:g} GB, the next smaller, would be {how}: {sum(map(len, fit)):,} layouts fit them, the "
        f"fastest gives {after:,.0f} tokens/s/GPU ({layout_words(there.config)}); {needs}"
    )


def fits_nowhere(config: TrainConfig, found: Layouts, cluster: Cluster) -> str:
    """One sentence: by how much no layout fits, and what would make one fit."""
    least, limit = found.least(), memory_of(cluster)
    need = found.bytes(least)
    return (
        f"no layout of {config.name} fits {cluster.gpus} GPUs of {limit / GB:.1f} GB: the least "
        f"({layout_words(least)}) needs {need / GB:.1f} GB, {(need - limit) / GB:.1f} GB too much: use "
        f"{', or '.join([*remedies(config, cluster), f'GPUs of {math.ceil(need / GB)} GB'])}"
    )


def remedies(config: TrainConfig, cluster: Cluster) -> Iterator[str]:
    """Settings with each of which a layout fits: fewer rollouts, more nodes, what takes memory beside the layout."""
    if has_rollouts(config) and config.grpo.rollout_batch > config.grpo.samples:
        fewer = replace(config, grpo=replace(config.grpo, rollout_batch=config.grpo.samples))
        if can_fit(fewer, cluster):
            yield f"grpo.rollout_batch={config.grpo.samples}"
    for factor in (2, 4, 8, 16, 32, 64):
        if can_fit(config, replace(cluster, nodes=cluster.nodes * factor)):
            yield f"cluster.nodes={cluster.nodes * factor}"
            break
    shared = replace(config, optimizer=replace(config.optimizer, sharding="zero1"))
    if config.optimizer.sharding == "none" and can_fit(shared, cluster):
        yield "optimizer.sharding=zero1"
    halved = replace(config, optimizer=replace(config.optimizer, moments="bf16"))
    if config.optimizer.moments == "fp32" and can_fit(halved, cluster):
        yield "optimizer.moments=bf16"
    for factor in (2, 4, 8):
        if config.seq_len % factor == 0 and can_fit(replace(config, seq_len=config.seq_len // factor), cluster):
            yield f"seq_len={config.seq_len // factor}"
            break


def can_fit(config: TrainConfig, cluster: Cluster) -> bool:
    """Whether any layout fits."""
    found = legal_layouts(config, cluster.gpus, cluster.gpus_per_node)
    return any(found.bytes(group[0]) <= memory_of(cluster) for group in found.groups.values())
