"""Seconds of one step of a run on a cluster, by parts with their sources; what follows for speed, days and money.

    pieces of work (`attention_work`, `mlp_work`)  ->  seconds (`rates`, `gemm_time`)
    ->  blocks and pairs (`layer_time`)  ->  stages (`stage_time`)
    ->  the schedule (`schedule.simulate`, replayed)  ->  + collectives and the update (`update_time`)

Sources: "record" was measured on this card at this size, "model" is the performance model, "bytes" over what a copy
reaches, "FLOPs" over attention's measured rate, "network model" bytes over the cluster's rates, "simulator" the
schedule's waits, "launches" the host. The parts of the busiest rank add up to the step.

A long schedule repeats itself: it is timed at two numbers of micro-batches, and the rest is a straight line. Left out:
uneven routing, jitter between ranks, input, checkpoints, validation, Muon's orthogonalization.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fp8moe.errors import ConfigError
from fp8moe.kernels.tiles import HOPPER_SMS
from fp8moe.layers.recipe import Precision
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import flops_per_token
from fp8moe.model.partition import Stage, partition
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.communicators import on_node
from fp8moe.plan.graph_costs import replayed
from fp8moe.plan.layer_time import Sizes, alone_seconds
from fp8moe.plan.network import Exchange, Gather, neighbour_seconds
from fp8moe.plan.rates import BYTES, MODEL, Card, added
from fp8moe.plan.stage_time import WHOLE, StageCosts, StageTime, View, paired, stage_time
from fp8moe.plan.teacher import teacher_seconds
from fp8moe.plan.update_time import UpdateTime, update_time
from fp8moe.schedule.build import FOLDED, build_schedule, num_stages
from fp8moe.schedule.replay import Replay
from fp8moe.train.config import TrainConfig, stages_of

SECONDS_AN_HOUR, SECONDS_A_DAY = 3600.0, 86400.0
NETWORK, HOST = "network model", "launches"
# What a step takes with everything, without the host's waits, without messages of keys too, on all SMs, and without
# messages to experts as well.
NO_KEYS = View(keys=False, host=False)
VIEWS = (View(), View(host=False), NO_KEYS, replace(NO_KEYS, fewer_sms=False), View(False, False, False, False))


@dataclass(frozen=True)
class Part:
    """Seconds of a step that one kind of work takes on the busiest rank, and where the figure comes from."""

    name: str
    seconds: float
    source: str


@dataclass(frozen=True)
class StepTime:
    """One step of the full batch. bubble: share of the step that the busiest rank waits for others; hidden: share of
    the layers' messages that compute hides (1.0 where there are none)."""

    seconds: float
    tokens: int
    gpus: int
    bubble: float
    hidden: float
    optimizer_seconds: float
    exposed_communication_seconds: float
    forward_seconds: float  # all forwards of the busiest rank's blocks, alone: what to recompute them whole would add
    parts: tuple[Part, ...]
    flops_per_token: float  # causal
    flops_per_token_noncausal: float
    peak_flops: float  # BF16, that MFU is stated against
    price_per_gpu_hour: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens that one GPU trains on in a second."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Share of the BF16 peak, half of attention's products counted (a causal mask)."""
        return self.flops_per_token * self.tokens_per_second_per_gpu / self.peak_flops

    @property
    def mfu_noncausal(self) -> float:
        """The same, all of attention's products counted."""
        return self.flops_per_token_noncausal * self.tokens_per_second_per_gpu / self.peak_flops

    def days(self, tokens: float) -> float:
        """Days to train on so many tokens."""
        return tokens / self.tokens * self.seconds / SECONDS_A_DAY

    def gpu_hours(self, tokens: float) -> float:
        """GPU hours to train on so many tokens."""
        return tokens / self.tokens * self.seconds * self.gpus / SECONDS_AN_HOUR

    def cost(self, tokens: float) -> float:
        """US dollars to train on so many tokens."""
        return self.gpu_hours(tokens) * self.price_per_gpu_hour


@functools.lru_cache(maxsize=256)
def _replay(name: str, pp: int, num_microbatches: int) -> Replay:
    return Replay(build_schedule(name, pp, num_microbatches))


def _line(name: str, pp: int, num_microbatches: int, value: Callable[[Replay], Sequence[float]]) -> list[float]:
    """`value` of a schedule; of a long one by a line through two shorter ones."""
    short = 2 * pp + 2 + num_microbatches % 2
    if num_microbatches <= short + 2:
        return list(value(_replay(name, pp, num_microbatches)))
    one, two = (value(_replay(name, pp, m)) for m in (short, short + 2))
    further = (num_microbatches - short) / 2
    return [a + (b - a) * further for a, b in zip(one, two, strict=True)]


@functools.lru_cache(maxsize=1024)
def _partition(
    model: ModelConfig, num_stages: int, seq_len: int, folded: bool, layout: tuple[int, ...] | None
) -> tuple[Stage, ...]:
    return partition(model, num_stages, seq_len=seq_len, folded=folded, layout=layout)


def _stages(config: TrainConfig) -> tuple[Stage, ...]:
    """`train.config.stages_of`, cut once for all configurations that cut alike."""
    parallel = config.parallel
    count = num_stages(parallel.schedule, parallel.pp)
    if config.model.num_layers < count:
        return stages_of(config)  # raises
    return _partition(config.model, count, config.seq_len, parallel.schedule in FOLDED, parallel.layout)


def sizes_of(config: TrainConfig, cluster: Cluster, imbalance: float = 1.0) -> Sizes:
    """What a block's time depends on in this layout."""
    parallel = config.parallel
    per_node = min(parallel.ranks_per_node or cluster.gpus_per_node, cluster.gpus_per_node)
    exchange = Exchange(parallel.dispatcher, config.ep, min(per_node, config.ep), parallel.chunks)
    tokens, padding, cp = config.rank_tokens, parallel.capacity_factor or 1.0, parallel.cp
    gather = Gather(cp, on_node("cp", cp, config, cluster.gpus_per_node)) if cp > 1 else None
    exact = parallel.capacity_factor is None
    return Sizes(config.model, config.recipe, tokens, config.seq_len, exchange, imbalance, padding, exact, gather)


def _costs(config: TrainConfig, times: tuple[StageTime, ...], message: float, view: View) -> StageCosts:
    overlap, count = config.parallel.overlap, len(times)
    alone = tuple(
        (t.alone("F", view), t.alone("B", view), t.alone("W", view), t.backward(view, overlap=overlap)) for t in times
    )
    pairs = {}
    if config.parallel.schedule in FOLDED:
        for stage in range(count):
            for other in {stage, count - 1 - stage}:
                pairs[stage, other] = paired(times[stage], times[other], view, overlap=overlap)
    return StageCosts(message=message, alone=alone, pairs=pairs)


def _times(
    config: TrainConfig, cluster: Cluster, stages: tuple[Stage, ...], imbalance: float = 1.0
) -> tuple[StageTime, ...]:
    sizes = sizes_of(config, cluster, imbalance)
    card = Card(cluster.gpu, cluster.hbm_gb_per_second * 1e9, config.recipe.fp8)
    left = HOPPER_SMS - config.parallel.communication_sms if config.ep * config.parallel.cp > 1 else HOPPER_SMS
    beside = replace(card, sms=left)
    times = tuple(stage_time(sizes, stage, card, beside, cluster) for stage in stages)
    if config.parallel.cuda_graphs:
        hops = sizes.exchange.hops
        times = tuple(replayed(config, *one, hops) for one in zip(stages, times, strict=True))
    return times


def _message(config: TrainConfig, cluster: Cluster) -> float:
    """Seconds of a message between neighbours of the pipeline."""
    size = 2.0 * config.rank_tokens * config.model.dim
    return neighbour_seconds(cluster, config.dp, size) if config.parallel.pp > 1 else 0.0


def _held(config: TrainConfig, rank: int) -> tuple[int, ...]:
    """Numbers of the stages of a pipeline rank."""
    last = num_stages(config.parallel.schedule, config.parallel.pp) - 1
    return (rank, last - rank) if config.parallel.schedule in FOLDED else (rank,)


def held_stages(config: TrainConfig, rank: int) -> tuple[Stage, ...]:
    """The stages of a pipeline rank."""
    return tuple(_stages(config)[index] for index in _held(config, rank))


def _update(config: TrainConfig, cluster: Cluster, mine: tuple[int, ...], costs: StageCosts) -> UpdateTime:
    return update_time(
        config,
        cluster,
        tuple(_stages(config)[index] for index in mine),
        backward=sum(costs.alone[index][3] for index in mine),
        forward=sum(costs.alone[index][0] for index in mine),
    )


def step_time(config: TrainConfig, cluster: Cluster, *, imbalance: float = 1.0) -> StepTime:
    """Time of a step of the full batch of a resolved configuration.

    imbalance: what the busiest rank's experts receive over an even share. Errors: ConfigError for FP32, not timed.
    """
    if config.precision.mode is Precision.FP32:
        raise ConfigError("precision.mode=fp32 has no timed kernels: use precision=bf16 or precision=fp8")
    parallel, pp, stages = config.parallel, config.parallel.pp, _stages(config)
    times = _times(config, cluster, stages, imbalance)
    at = (parallel.schedule, pp, config.num_microbatches)
    message = _message(config, cluster)
    views = VIEWS if parallel.cp > 1 else tuple(view for view in VIEWS if view is not NO_KEYS)
    costs = [_costs(config, times, message, view) for view in views]
    (makespan,) = _line(*at, lambda replay: (replay.makespan(costs[0].of, message),))
    busy = [_line(*at, lambda replay, one=one: replay.busy(one.of)) for one in costs]  # type: ignore[misc]
    busiest = max(range(pp), key=busy[0].__getitem__)
    whole, device, *no_keys, on_all, computed = (one[busiest] for one in busy)
    experts = (no_keys or [device])[0]  # with messages to them alone
    fewer_sms = experts - on_all
    mine = _held(config, busiest)
    update = _update(config, cluster, mine, costs[0])
    makespan = max(makespan, whole)  # equal but for rounding where nobody waits
    taught = teacher_seconds(config, cluster)
    seconds = makespan + update.exposed + update.update + taught
    passes = config.num_microbatches / (2 if parallel.schedule == "dualpipe" else 1)
    messages, waits = passes * sum(times[index].messages() for index in mine), device - fewer_sms - computed
    parts = [
        *_parts([times[index] for index in mine], passes, computed),
        Part("fewer SMs beside messages", fewer_sms, MODEL),
        *(Part("waits for messages of keys", device - one, NETWORK) for one in no_keys),
        Part("waits for messages", on_all - computed, NETWORK),
        Part("waits for the host", whole - device, HOST),
        Part("bubble", makespan - whole, "simulator"),
        Part("gradients and weights between replicas", update.exposed, NETWORK),
        Part("optimizer", update.update, BYTES),
        *([Part("teacher's forwards", taught, MODEL)] if taught else []),
    ]
    return StepTime(
        seconds=seconds,
        tokens=config.batch.sequences * config.seq_len,
        gpus=pp * config.dp,
        bubble=(makespan - whole) / seconds,
        hidden=max(0.0, 1 - waits / messages) if messages else 1.0,
        optimizer_seconds=update.update,
        exposed_communication_seconds=waits + update.exposed,
        forward_seconds=passes * sum(alone_seconds(times[index].blocks, "F") for index in mine),
        parts=tuple(parts),
        flops_per_token=flops_per_token(config.model, config.seq_len),
        flops_per_token_noncausal=flops_per_token(config.model, config.seq_len, causal=False),
        peak_flops=cluster.bf16_tflops * 1e12,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
    )


def _parts(times: list[StageTime], passes: float, computed: float) -> list[Part]:
    """Compute by kind and source, longest first. `computed` is their sum as the schedule counts it."""
    found = added(*(time.parts() for time in times))
    scale = computed / (passes * sum(found.values()))
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [Part(name, seconds * passes * scale, source) for (name, source), seconds in ordered]


def least_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """A bound that `step_time` does not fall below, without the schedule: a search leaves out what is slower than it.

    A rank starts when the first micro-batch has reached it, and computes all of its passes; under 1f1b the last
    backward then goes back to the first rank. An overlapped pair takes as long as the compute, or the launches, of its
    two passes. Of the ranks' updates the shortest counts.
    """
    schedule, pp, count = config.parallel.schedule, config.parallel.pp, config.num_microbatches
    times = _times(config, cluster, _stages(config))
    costs = _costs(config, times, _message(config, cluster), WHOLE)
    passed, updated = [], []
    for rank in range(pp):
        mine = _held(config, rank)
        passes = count / 2 if schedule == "dualpipe" else count
        if schedule in FOLDED:
            work = sum(max(times[i].compute(), times[i].host("FBW", WHOLE)) for i in mine)
        else:
            forward, b, w, whole = costs.alone[rank]
            work = forward + min(whole, b + w)
        before = range(min(rank, pp - 1 - rank) if schedule == "dualpipe" else rank)
        back = sum(costs.alone[i][3] for i in before) if schedule == "1f1b" else 0.0
        passed.append(passes * work + sum(costs.alone[i][0] for i in before) + back)
        updated.append(_update(config, cluster, mine, costs))
    after = min(update.exposed + update.update for update in updated)
    return max(passed) + after + teacher_seconds(config, cluster)
