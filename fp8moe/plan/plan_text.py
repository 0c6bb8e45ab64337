"""A prediction and the results of a search as text for a terminal: tables and one sentence a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fp8moe.plan.memory import RankMemory
from fp8moe.plan.prediction import HOUR, Prediction, imbalance_of, memory_of, worst
from fp8moe.plan.schedule_tables import table
from fp8moe.schedule.build import build_schedule, microbatches
from fp8moe.train.config import TrainConfig, stages_of

GB = 1e9
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def plan_text(found: Prediction, refused: Sequence[str]) -> str:
    """Everything about one layout. refused: what of the settings as they are `fp8moe train` would not take."""
    parts = [_title(found)]
    if refused:
        parts.append("\n".join(["can't run as written:", *(f"  {sentence}" for sentence in refused)]))
    return "\n\n".join([*parts, _memory(found), _time(found), _run(found)])


def layout_words(config: TrainConfig) -> str:
    """A resolved configuration's layout in one line."""
    again = ", ".join(sorted(config.recompute)) or "nothing"
    return (
        f"pp={config.parallel.pp} dp={config.dp} ep={config.ep} {config.parallel.schedule}, "
        f"{config.num_microbatches} micro-batches of {config.micro_batch}, recomputed: {again}"
    )


def short(number: float) -> str:
    """A count in three digits: 14.8T, 2.66M, 950."""
    for scale, letter in SCALES:
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def _title(found: Prediction) -> str:
    config, cluster = found.config, found.cluster
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return (
        f"{config.name} on {cluster.name}: {cluster.gpus:,} {cluster.gpu} in {nodes}; every figure is a prediction, "
        f"none was measured\n{layout_words(config)}; {config.precision.mode}, {config.batch.sequences:,} sequences of "
        f"{config.seq_len:,} tokens a step"
    )


def _memory(found: Prediction) -> str:
    limit, most = memory_of(found.cluster), found.worst
    spare = limit - most.total
    verdict = f"fits, {spare / GB:.1f} GB to spare" if spare >= 0 else f"does not fit, {-spare / GB:.1f} GB too much"
    lines = [
        f"{verdict}: pipeline rank {most.pp_rank} needs {most.total / GB:.1f} GB of the GPU's {limit / GB:.1f} GB "
        f"(GB = 1e9 bytes), routing balanced",
        _imbalanced(found),
    ]
    stages = stages_of(found.config)
    held = held_by_rank(found.config)
    kinds = list(dict.fromkeys(kind for rank in found.balanced for kind in rank.kinds))
    rows = [
        _memory_row(rank, kinds, found.imbalanced, "; ".join(str(stages[index]) for index in held[rank.pp_rank]))
        for rank in found.balanced
    ]
    over = () if found.imbalanced is None else (f"at {imbalance_of(found.config):g}",)
    return "\n".join([*lines, table(("rank", *kinds, "all", *over, "stages"), rows)])


def _imbalanced(found: Prediction) -> str:
    if found.imbalanced is None:
        return "parallel.max_imbalance=null sets no limit to the rows of a rank: uneven routing needs more, without a bound"
    most, limit = worst(found.imbalanced), memory_of(found.cluster)
    verdict = "fits too" if most.total <= limit else "does not fit"
    return (
        f"where a rank receives {imbalance_of(found.config):g} times an even share: {verdict}, rank {most.pp_rank} needs "
        f"{most.total / GB:.1f} GB"
    )


def _memory_row(
    rank: RankMemory, kinds: Sequence[str], imbalanced: Sequence[RankMemory] | None, stages: str
) -> tuple[str, ...]:
    over = () if imbalanced is None else (f"{imbalanced[rank.pp_rank].total / GB:.1f}",)
    sizes = [f"{rank.kinds.get(kind, 0.0) / GB:.2f}" for kind in kinds]
    return (str(rank.pp_rank), *sizes, f"{rank.total / GB:.1f}", *over, stages)


def held_by_rank(config: TrainConfig) -> list[list[int]]:
    """Numbers of the stages that each pipeline rank holds."""
    parallel = config.parallel
    least, _ = microbatches(parallel.schedule, parallel.pp)  # who holds what is the same for any number
    schedule = build_schedule(parallel.schedule, parallel.pp, least)
    return [sorted({stage for _, stage in schedule.held_by(rank)}) for rank in range(parallel.pp)]


def _time(found: Prediction) -> str:
    time = found.time
    rows = [
        (part.name, f"{part.seconds:.4g}", f"{part.seconds / time.seconds:.1%}", part.source) for part in time.parts
    ]
    header = ("part of a step", "seconds", "share", "from")
    return "\n".join([f"{time.seconds:.4g} seconds a step of {short(time.tokens)} tokens", table(header, rows)])


def _run(found: Prediction) -> str:
    time, mfu, cluster = found.time, found.mfu, found.cluster
    whole = time.tokens_per_second_per_gpu * cluster.gpus
    return "\n".join(
        [
            f"{time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {short(whole)} tokens/s in all",
            f"MFU {mfu['causal']:.1%} (causal), {mfu['non_causal']:.1%} (non-causal) of {cluster.bf16_tflops:g} TFLOPS",
            f"communication hidden {time.hidden:.1%}, exposed {time.exposed_communication_seconds:.3g} s; bubble "
            f"{time.bubble:.1%}; optimizer {time.optimizer_seconds:.3g} s",
            f"{short(found.tokens)} tokens: {found.seconds / (24 * HOUR):.3g} days, {found.gpu_hours:,.0f} GPU hours, "
            f"${found.price:,.0f} at ${cluster.price_per_gpu_hour:g} a GPU hour",
        ]
    )
