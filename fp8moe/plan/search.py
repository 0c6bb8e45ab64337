"""The fastest layouts of a configuration that fit a cluster's GPUs, and what would make it fit where none does.

Every legal layout gets its memory; those that fit are ranked by tokens a second, equal ones by memory.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.layouts import KEYS, changed, layouts, recompute_sets
from fp8moe.plan.plan_text import GB, layout_words
from fp8moe.plan.prediction import layout_json, memory_of, memory_on, worst
from fp8moe.plan.schedule_tables import table
from fp8moe.plan.step_time import StepTime, step_time
from fp8moe.train.config import TrainConfig

# What torch reports as the memory of Hopper GPUs of 64, 80, 96 and 141 GB, in GB of 1e9 bytes.
HOPPERS = (68.0, 85.0, 101.0, 150.0)


@dataclass(frozen=True)
class Sized:
    """A legal layout, resolved, with the bytes that its worst pipeline rank needs where routing is balanced."""

    config: TrainConfig
    bytes: float


@dataclass(frozen=True)
class Ranked:
    """A layout that fits, and its step."""

    sized: Sized
    time: StepTime


@dataclass(frozen=True)
class Search:
    """best: the fastest first. layouts: all legal ones. fit: how many of them fit."""

    best: tuple[Ranked, ...]
    layouts: tuple[Sized, ...]
    fit: int

    @property
    def least(self) -> Sized:
        """The layout that needs least memory."""
        return min(self.layouts, key=lambda one: one.bytes)


def search(config: TrainConfig, cluster: Cluster, count: int = 5) -> Search:
    """The `count` fastest layouts of a configuration, which need not be resolved. Raises ConfigError if none is legal."""
    found = sized(config, cluster)
    if not found:
        raise ConfigError(
            f"no layout of {cluster.gpus} GPUs is legal for batch.sequences={config.batch.sequences}: use a multiple of "
            f"{cluster.gpus}"
        )
    fit = [one for one in found if one.bytes <= memory_of(cluster)]
    return Search(fastest(fit, cluster, count), tuple(found), len(fit))


def sized(config: TrainConfig, cluster: Cluster) -> list[Sized]:
    """Every legal layout with its memory."""
    return [
        Sized(laid, worst(memory_on(laid, cluster)).total)
        for laid in layouts(config, cluster.gpus, cluster.gpus_per_node)
    ]


def fastest(found: Sequence[Sized], cluster: Cluster, count: int) -> tuple[Ranked, ...]:
    """The `count` with most tokens a second; of equally fast ones those that need less memory."""
    ranked = [Ranked(one, step_time(one.config, cluster)) for one in found]
    ranked.sort(key=lambda one: (-one.time.tokens_per_second_per_gpu, one.sized.bytes))
    return tuple(ranked[:count])


def paste(config: TrainConfig, settings: Sequence[str], best: TrainConfig, cluster: Cluster) -> str:
    """The command that trains in that layout. settings: the run's own, which stay where the layout has no key of them."""
    keys = changed(config, best, always=KEYS)
    taken = {key.partition("=")[0] for key in keys}
    kept = [setting for setting in settings if setting.partition("=")[0].lstrip("+") not in taken]
    nproc = ["--nproc", str(cluster.gpus)] if cluster.nodes == 1 and cluster.gpus > 1 else []
    return shlex.join(["fp8moe", "train", *nproc, *kept, *keys])


def smaller_memory(found: Search, cluster: Cluster) -> str:
    """One sentence: what the same number of GPUs with the next smaller memory could do."""
    sizes = [size for size in HOPPERS if size < cluster.memory_gb - 1]
    least = found.least
    needs = f"the least that any layout needs is {least.bytes / GB:.1f} GB ({layout_words(least.config)})"
    if not sizes:
        return f"no smaller Hopper is known; {needs}"
    fit = [one for one in found.layouts if one.bytes <= sizes[-1] * GB]
    if not fit:
        return f"GPUs of {sizes[-1]:g} GB, the next smaller, would not do: {needs}"
    best = fastest(fit, replace(cluster, memory_gb=sizes[-1]), 1)[0]
    lost = 1 - best.time.tokens_per_second_per_gpu / found.best[0].time.tokens_per_second_per_gpu
    how = f"{lost:.1%} slower" if lost > 0.0005 else "as fast"
    return (
        f"GPUs of {sizes[-1]:g} GB, the next smaller, would be {how}: {len(fit)} layouts fit them, the fastest gives "
        f"{best.time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU ({layout_words(best.sized.config)}); {needs}"
    )


def fits_nowhere(config: TrainConfig, found: Search, cluster: Cluster) -> str:
    """One sentence: by how much no layout fits, and what would make one fit."""
    least, limit = found.least, memory_of(cluster)
    return (
        f"no layout of {config.name} fits {cluster.gpus} GPUs of {limit / GB:.1f} GB: the least, "
        f"{layout_words(least.config)}, needs {least.bytes / GB:.1f} GB, {(least.bytes - limit) / GB:.1f} GB too much: use "
        f"{', or '.join([*remedies(config, cluster), f'GPUs of {math.ceil(least.bytes / GB)} GB'])}"
    )


def remedies(config: TrainConfig, cluster: Cluster) -> Iterator[str]:
    """Settings with each of which a layout fits: more nodes, and what of the run takes memory beside its layout."""
    for factor in (2, 4, 8, 16, 32, 64):
        if can_fit(config, replace(cluster, nodes=cluster.nodes * factor)):
            yield f"cluster.nodes={cluster.nodes * factor}"
            break
    optimizer = config.optimizer
    if optimizer.sharding == "none" and can_fit(
        replace(config, optimizer=replace(optimizer, sharding="zero1")), cluster
    ):
        yield "optimizer.sharding=zero1"
    if optimizer.moments == "fp32" and can_fit(replace(config, optimizer=replace(optimizer, moments="bf16")), cluster):
        yield "optimizer.moments=bf16"
    for factor in (2, 4, 8):
        length = config.seq_len // factor
        if config.seq_len % factor == 0 and can_fit(replace(config, seq_len=length), cluster):
            yield f"seq_len={length}"
            break


def can_fit(config: TrainConfig, cluster: Cluster) -> bool:
    """Whether a layout fits, of those that compute again all they can: less of it never needs less memory."""
    every = recompute_sets(config.precision.mode)[-1]
    return any(
        worst(memory_on(laid, cluster)).total <= memory_of(cluster)
        for laid in layouts(config, cluster.gpus, cluster.gpus_per_node, recomputed=[every])
    )


def search_text(found: Search, cluster: Cluster) -> str:
    """Table of the best layouts."""
    rows = []
    for number, one in enumerate(found.best, 1):
        config, time = one.sized.config, one.time
        again = ",".join(sorted(config.recompute)) or "-"
        sizes = (config.parallel.pp, config.dp, config.ep)
        speed = f"{time.tokens_per_second_per_gpu:,.0f}"
        shares = (f"{time.bubble:.1%}", f"{time.hidden:.1%}", f"{one.sized.bytes / GB:.1f}")
        rows.append(
            (str(number), *map(str, sizes), config.parallel.schedule, str(config.micro_batch), again, speed, *shares)
        )
    header = ("", "pp", "dp", "ep", "schedule", "micro-batch", "recomputed", "tokens/s/GPU", "bubble", "hidden", "GB")
    title = (
        f"{len(found.layouts):,} legal layouts of {cluster.gpus:,} GPUs, {found.fit:,} of them fit {cluster.memory_gb:g} GB; "
        "the fastest, predicted"
    )
    return f"{title}\n{table(header, rows)}"


def search_json(found: Search) -> dict[str, Any]:
    """The same figures by name."""
    best = [
        {
            "layout": layout_json(one.sized.config),
            "tokens_per_second_per_gpu": one.time.tokens_per_second_per_gpu,
            "bytes": one.sized.bytes,
            "bubble": one.time.bubble,
            "hidden": one.time.hidden,
        }
        for one in found.best
    ]
    return {"legal": len(found.layouts), "fit": found.fit, "best": best}
