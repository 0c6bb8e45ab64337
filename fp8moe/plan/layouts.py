"""Layouts of a configuration on a number of GPUs, by train's rules.

pp x ep x cp x schedule x recompute x micro-batch, each without CUDA graphs of a micro-batch and with them.

A layout is legal where `train.config.laid_out` accepts it, which is what `fp8moe train` does first. Three settings that
are none of a layout's keys follow it where they would forbid it: the start and the increment of a batch that grows are
rounded up to the next size that makes enough micro-batches, `validation.samples` to the nearest that every rank gets an
equal share of, and `parallel.layout` is left out where it has another number of stages. All else stays as it is.

Ranks share sequences (`parallel.cp`) where a micro-batch is one sequence, and keep 2,048 tokens of it each: two ranks
with two sequences compute as many tokens as one with one, and gather keys for it; shorter parts read all weights for
few rows. The settings' own cp is always tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, Literal, NamedTuple, cast

from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision, Recompute
from fp8moe.parallel.mesh import divisors
from fp8moe.plan.cluster import Cluster
from fp8moe.schedule.build import SCHEDULES, microbatches, num_stages
from fp8moe.train.batch import BatchConfig, data_ranks_in_words
from fp8moe.train.config import TrainConfig, laid_out

# The keys of a layout, and those that follow it, in the order in which they are written.
KEYS = ("parallel.pp", "parallel.ep", "parallel.schedule", "batch.micro_batch", "recompute")
FOLLOWING = (
    *("parallel.cp", "parallel.dp", "parallel.layout", "batch.ramp_from", "batch.increment", "validation.samples"),
    *("parallel.cuda_graphs", "parallel.capacity_factor", "parallel.max_imbalance"),
    *("optimizer.sharding", "grpo.rollout_batch"),
)
LEAST_PART = 2048  # tokens of a sequence that a rank has where several share it


class Layout(NamedTuple):
    """What a search chooses; dp is the GPUs over pp."""

    pp: int
    ep: int
    schedule: str
    micro_batch: int
    recompute: tuple[Recompute, ...]
    cp: int = 1
    cuda_graphs: bool = False


def as_written(config: TrainConfig, cluster: Cluster) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration for the cluster's GPUs, and a sentence for each setting that `fp8moe train` would refuse.

    Left out for the plan, and named, are a batch that grows from too small a size and a number of validation samples.
    Raises ValueError or ConfigError where nothing is left that could be planned.
    """
    refused = []
    try:
        found = laid_out(config, cluster.gpus, cluster.gpus_per_node)
    except ValueError as error:
        if config.batch.ramp_from is None:
            raise
        constant = replace(config.batch, ramp_from=None, ramp_samples=0, increment=None)
        found = laid_out(replace(config, batch=constant), cluster.gpus, cluster.gpus_per_node)
        refused.append(f"{error}; planned with the full batch of {constant.sequences}")
    try:
        found.validation.check(found.data_ranks, found.micro_batch, of=data_ranks_in_words(found.parallel.cp))
    except ValueError as error:
        refused.append(str(error))
    return found, tuple(refused)


def layouts(
    config: TrainConfig,
    gpus: int,
    gpus_per_node: int,
    recomputed: Sequence[tuple[Recompute, ...]] | None = None,
    *,
    near: bool = False,
) -> Iterator[TrainConfig]:
    """The configuration, which need not be resolved, in every legal layout, resolved.

    recomputed: sets of what a backward computes again; None: every one. near: those alone that have the pp, ep and cp
    of the configuration, which is resolved, or experts within a node where that spreads them over several.
    """
    recomputed = recompute_sets(config.precision.mode) if recomputed is None else recomputed
    for layout in _tried(config, gpus, recomputed[0], gpus_per_node if near else None):
        found = laid_out_as(config, layout, gpus, gpus_per_node)
        if found is not None:  # what is computed again forbids nothing
            yield from (replace(found, recompute=names) for names in recomputed)


def _tried(config: TrainConfig, gpus: int, recompute: tuple[Recompute, ...], node: int | None) -> Iterator[Layout]:
    """Layouts that could be legal; those of one pp, schedule, ep, cp and CUDA graphs by growing micro-batch.

    node: GPUs of one, for those near the configuration's; None: all.
    """
    near = node is not None
    for pp in [config.parallel.pp] if near else divisors(gpus):
        dp = gpus // pp
        if config.optimizer.sharding == "deepspeed" and (pp > 1 or dp == 1):
            continue
        for cp, micro_batch in _shares(config, dp):
            if near and cp != config.parallel.cp:
                continue
            eps = divisors(math.gcd(dp // cp, config.model.experts.num_experts))
            if node is not None:
                eps = sorted({config.ep, max(ep for ep in eps if ep <= min(node, config.ep))})
            for schedule, ep in product(SCHEDULES, eps):
                graphs = (False, True) if pp == cp == 1 and schedule == "1f1b" else (False,)
                yield from (Layout(pp, ep, schedule, micro_batch, recompute, cp, one) for one in graphs)


def _shares(config: TrainConfig, dp: int) -> Iterator[tuple[int, int]]:
    """(ranks that share a sequence, sequences of a micro-batch), the second ascending, that dp ranks could take."""
    for cp in divisors(dp):
        data_ranks, own = dp // cp, cp in (1, config.parallel.cp)
        if config.batch.sequences % data_ranks or config.seq_len % (2 * cp):
            continue
        if own or config.seq_len >= cp * LEAST_PART:
            sizes = divisors(config.batch.sequences // data_ranks)
            yield from ((cp, size) for size in (sizes if own else sizes[:1]))


def recompute_sets(precision: Precision) -> list[tuple[Recompute, ...]]:
    """Every set of what a backward may compute again, the empty one first; FP8 always has swiglu in it."""
    free = [name for name in Recompute if precision is not Precision.FP8 or name is not Recompute.SWIGLU]
    always = set(Recompute) - set(free)
    return [
        tuple(name for name in Recompute if name in always | set(chosen))
        for count in range(len(free) + 1)
        for chosen in combinations(free, count)
    ]


def laid_out_as(config: TrainConfig, layout: Layout, gpus: int, gpus_per_node: int) -> TrainConfig | None:
    """The configuration in that layout, resolved; None where the layout is not legal for it."""
    try:
        return laid_out(applied(config, layout, gpus), gpus, gpus_per_node)
    except ValueError:  # a ConfigError is one
        return None


def applied(config: TrainConfig, layout: Layout, gpus: int) -> TrainConfig:
    """The configuration with the keys of `layout`, not resolved. Raises ValueError where the schedule can't be."""
    pp, dp, schedule = layout.pp, gpus // layout.pp, layout.schedule
    by_hand = config.parallel.layout
    stays = by_hand is not None and len(by_hand) == num_stages(schedule, pp)
    parallel = replace(
        config.parallel,
        pp=pp,
        dp=None,
        ep=layout.ep,
        cp=layout.cp,
        schedule=cast(Literal["1f1b", "zb1p", "dualpipe", "dualpipev"], schedule),
        layout=by_hand if stays else None,
        cuda_graphs=layout.cuda_graphs,
    )
    unit = dp // layout.cp * layout.micro_batch
    samples = config.validation.samples
    if samples % unit:
        samples = max(1, round(samples / unit)) * unit
    return replace(
        config,
        parallel=parallel,
        recompute=layout.recompute,
        batch=_batch(config.batch, layout.micro_batch, unit, *microbatches(schedule, pp)),
        validation=config.validation
        if samples == config.validation.samples
        else replace(config.validation, samples=samples),
    )


def _batch(batch: BatchConfig, micro_batch: int, unit: int, least: int, multiple: int) -> BatchConfig:
    """The batch in micro-batches of that size, the sizes it grows through rounded up to legal ones."""
    if batch.ramp_from is None:
        return replace(batch, micro_batch=micro_batch)
    step = unit * multiple
    start = max(least * unit, -(-batch.ramp_from // step) * step)
    if start > batch.sequences:
        raise ConfigError(f"batch.sequences={batch.sequences} makes too few micro-batches: use {start}")
    increment = batch.increment
    if increment is not None:
        increment = -(-increment // step) * step
    return replace(batch, micro_batch=micro_batch, ramp_from=start, increment=increment)


def changed(before: TrainConfig, after: TrainConfig, always: Sequence[str] = ()) -> list[str]:
    """Settings `key=value` that make the layout of `after` from `before`; those of `always` in any case."""
    return [
        f"{key}={_written(_get(after, key))}"
        for key in (*KEYS, *FOLLOWING)
        if key in always or _get(before, key) != _get(after, key)
    ]


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return frozenset(config) if key == "recompute" else config


def _written(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"[{','.join(name for name in Recompute if name in value)}]"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
