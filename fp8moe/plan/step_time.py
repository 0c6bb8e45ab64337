"""Seconds of one step of a run on a cluster, by its parts, each with its source; what follows for speed, days and money.

    pieces of work (`attention_work`, `mlp_work`)  ->  seconds (`rates`, `gemm_time`)  ->  blocks and pairs (`layer_time`)
    ->  stages (`stage_time`)  ->  the schedule, simulated (`schedule.simulate`)  ->  + collectives and update

Sources: "record" was measured on this card at this size, "model" is the performance model of products, "bytes" over the
bandwidth that a copy reaches, "FLOPs" over attention's measured rate, "network model" bytes over the cluster's rates,
"simulator" the schedule's waits, "launches" the host. The parts of the busiest rank add up to the step.

A long schedule repeats itself: it is simulated at two numbers of micro-batches, and the rest is a straight line.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fp8moe.errors import ConfigError
from fp8moe.kernels.tiles import HOPPER_SMS
from fp8moe.layers.recipe import Precision
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import flops_per_token
from fp8moe.model.partition import Stage, partition
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.layer_time import Sizes
from fp8moe.plan.network import Exchange, neighbour_seconds
from fp8moe.plan.rates import Card
from fp8moe.plan.stage_time import StageCosts, StageTime, paired, stage_time
from fp8moe.plan.update_time import UpdateTime, update_time
from fp8moe.schedule.build import FOLDED, build_schedule, num_stages
from fp8moe.schedule.replay import Replay
from fp8moe.train.config import TrainConfig, stages_of

SECONDS_AN_HOUR, SECONDS_A_DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Part:
    """Seconds of a step that one kind of work takes on the busiest rank, and where the figure comes from."""

    name: str
    seconds: float
    source: str


@dataclass(frozen=True)
class StepTime:
    """One step of the full batch. bubble: share of the step that the busiest rank waits for others; hidden: share of
    the messages to experts that compute hides (1.0 where there are none)."""

    seconds: float
    tokens: int
    gpus: int
    bubble: float
    hidden: float
    optimizer_seconds: float
    exposed_communication_seconds: float
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


def _simulated(name: str, pp: int, num_microbatches: int, costs: StageCosts) -> tuple[float, list[float]]:
    """Makespan and each rank's busy seconds; a long schedule by a line through two shorter ones."""
    short = 2 * pp + 2 + num_microbatches % 2
    if num_microbatches <= short + 2:
        return _replay(name, pp, num_microbatches).run(costs.of, costs.message)
    (made, busy), (later, more) = (_replay(name, pp, m).run(costs.of, costs.message) for m in (short, short + 2))
    further = (num_microbatches - short) / 2
    return made + (later - made) * further, [a + (b - a) * further for a, b in zip(busy, more, strict=True)]


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


def _sizes(config: TrainConfig, cluster: Cluster) -> Sizes:
    parallel = config.parallel
    per_node = min(parallel.ranks_per_node or cluster.gpus_per_node, cluster.gpus_per_node)
    exchange = Exchange(parallel.dispatcher, config.ep, min(per_node, config.ep), parallel.chunks)
    return Sizes(config.model, config.recipe, config.micro_batch * config.seq_len, config.seq_len, exchange)


def _rank_stages(config: TrainConfig, rank: int, count: int) -> tuple[int, ...]:
    folded = config.parallel.schedule in FOLDED
    return (rank, count - 1 - rank) if folded else (rank,)


def _costs(config: TrainConfig, cluster: Cluster, times: tuple[StageTime, ...], tokens: int) -> StageCosts:
    overlap, count = config.parallel.overlap, len(times)
    alone = tuple((t.alone("F"), t.alone("B"), t.alone("W"), t.backward(overlap=overlap)) for t in times)
    pairs = {}
    if config.parallel.schedule in FOLDED:
        for stage in range(count):
            for other in {stage, count - 1 - stage}:
                pairs[stage, other] = paired(times[stage], times[other], overlap=overlap)
    message = 0.0
    if config.parallel.pp > 1:
        message = neighbour_seconds(cluster, config.dp, 2.0 * tokens * config.model.dim)
    return StageCosts(message=message, alone=alone, pairs=pairs)


@dataclass(frozen=True)
class _Timed:
    """Stages with their times, and the schedule's costs."""

    sizes: Sizes
    stages: tuple[Stage, ...]
    times: tuple[StageTime, ...]
    costs: StageCosts


def _timed(config: TrainConfig, cluster: Cluster) -> _Timed:
    if config.precision.mode is Precision.FP32:
        raise ConfigError("precision.mode=fp32 has no timed kernels: use precision=bf16 or precision=fp8")
    sizes, stages = _sizes(config, cluster), _stages(config)
    parallel = config.parallel
    card = Card(cluster.gpu, cluster.hbm_gb_per_second * 1e9, config.recipe.fp8)
    left = HOPPER_SMS - parallel.communication_sms if config.ep > 1 else HOPPER_SMS
    beside = Card(card.name, card.hbm, card.fp8, left)
    times = tuple(stage_time(sizes, stage, card, beside, cluster) for stage in stages)
    return _Timed(sizes, stages, times, _costs(config, cluster, times, sizes.tokens))


def step_time(config: TrainConfig, cluster: Cluster) -> StepTime:
    """Time of a step of the full batch of a resolved configuration. Errors: ConfigError for FP32, which nobody times."""
    timed = _timed(config, cluster)
    stages, times, costs, parallel = timed.stages, timed.times, timed.costs, config.parallel
    pp = parallel.pp
    makespan, busy = _simulated(parallel.schedule, pp, config.num_microbatches, costs)
    busiest = max(range(pp), key=busy.__getitem__)
    mine = _rank_stages(config, busiest, len(stages))
    update = _update(config, cluster, timed, mine)
    seconds = makespan + update.exposed + update.update
    passes = config.num_microbatches / len(mine) if parallel.schedule == "dualpipe" else config.num_microbatches
    parts = _parts([times[index] for index in mine], passes)
    computed = sum(part.seconds for part in parts)
    messages = passes * sum(times[index].messages() for index in mine)
    exposed = max(0.0, busy[busiest] - computed)
    parts += [
        Part("waits for messages, fewer SMs, launches", exposed, "network model"),
        Part("bubble", makespan - busy[busiest], "simulator"),
        Part("gradients and weights between replicas", update.exposed, "network model"),
        Part("optimizer", update.update, "bytes"),
    ]
    return StepTime(
        seconds=seconds,
        tokens=config.batch.sequences * config.seq_len,
        gpus=pp * config.dp,
        bubble=(makespan - busy[busiest]) / seconds,
        hidden=max(0.0, 1 - exposed / messages) if messages else 1.0,
        optimizer_seconds=update.update,
        exposed_communication_seconds=exposed + update.exposed,
        parts=tuple(parts),
        flops_per_token=flops_per_token(config.model, config.seq_len),
        flops_per_token_noncausal=flops_per_token(config.model, config.seq_len, causal=False),
        peak_flops=cluster.bf16_tflops * 1e12,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
    )


def _parts(times: list[StageTime], passes: float) -> list[Part]:
    found: dict[tuple[str, str], float] = {}
    for time in times:
        for key, seconds in time.parts().items():
            found[key] = found.get(key, 0.0) + seconds * passes
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [Part(name, seconds, source) for (name, source), seconds in ordered]


def least_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """A bound that `step_time` does not fall below, without the schedule: a search leaves out what is slower than it.

    A rank starts when the first micro-batch has reached it, and computes all of its passes; under 1f1b the last
    backward then goes back to the first rank. An overlapped pair takes as long as the compute of its two passes. Of the
    ranks' updates the shortest counts.
    """
    timed = _timed(config, cluster)
    schedule, pp, count = config.parallel.schedule, config.parallel.pp, config.num_microbatches
    alone = timed.costs.alone
    passed, updated = [], []
    for rank in range(pp):
        mine = _rank_stages(config, rank, len(timed.stages))
        before = range(min(rank, pp - 1 - rank) if schedule == "dualpipe" else rank)
        passes = count / len(mine) if schedule == "dualpipe" else count
        if schedule in FOLDED:
            work = sum(timed.times[i].compute() for i in mine)
        else:
            forward, b, w, whole = alone[rank]
            work = forward + min(whole, b + w)
        back = sum(alone[i][3] for i in before) if schedule == "1f1b" else 0.0
        passed.append(passes * work + sum(alone[i][0] for i in before) + back)
        updated.append(_update(config, cluster, timed, mine))
    return max(passed) + min(update.exposed + update.update for update in updated)


def _update(config: TrainConfig, cluster: Cluster, timed: _Timed, mine: tuple[int, ...]) -> UpdateTime:
    return update_time(
        config,
        cluster,
        tuple(timed.stages[index] for index in mine),
        backward=sum(timed.costs.alone[index][3] for index in mine),
        forward=sum(timed.costs.alone[index][0] for index in mine),
    )
