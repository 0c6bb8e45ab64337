"""A prediction and the results of a search as text for a terminal: tables and one sentence a figure."""

from __future__ import annotations

from collections.abc import Sequence

from fp8moe.layers.attention.context_bytes import key_heads_at_once, ring_row_bytes, row_bytes, whole_keys_bytes
from fp8moe.layers.recipe import Recompute
from fp8moe.model.memory import rank_parameters
from fp8moe.plan.memory import KINDS, worst_rank
from fp8moe.plan.prediction import Prediction, imbalance_of, memory_of
from fp8moe.plan.schedule_tables import table
from fp8moe.schedule.build import build_schedule, microbatches
from fp8moe.train.config import TrainConfig, stages_of

GB = 1e9
COLUMNS = 12  # of a table of memory, before the next begins
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def plan_text(found: Prediction, refused: Sequence[str]) -> str:
    """Everything about one layout. refused: what of the settings as they are `fp8moe train` would not take."""
    parts = [_title(found)]
    if refused:
        parts.append("\n".join(["can't run as written:", *(f"  {sentence}" for sentence in refused)]))
    keys = [_keys(found.config)] if found.config.parallel.cp > 1 else []
    return "\n\n".join([*parts, _memory(found), *keys, _time(found), _run(found)])


def layout_words(config: TrainConfig) -> str:
    """A resolved configuration's layout in one line."""
    again = ", ".join(name for name in Recompute if name in config.recompute) or "nothing"
    shared = f"cp={config.parallel.cp} " if config.parallel.cp > 1 else ""
    return (
        f"pp={config.parallel.pp} dp={config.dp} ep={config.ep} {shared}{config.parallel.schedule}, "
        f"{'CUDA graphs, ' if config.parallel.cuda_graphs else ''}"
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
    search = "" if found.fits else "; fp8moe plan --search lists the layouts that do"
    lines = [
        f"{verdict}: pipeline rank {most.pp_rank} needs {most.total / GB:.1f} GB of the GPU's {limit / GB:.1f} GB "
        f"(GB = 1e9 bytes), routing balanced{search}",
        _imbalanced(found),
    ]
    groups = _alike(found)
    kinds = [kind for kind in KINDS if any(rank.kinds[kind] for rank in found.balanced)]
    for start in range(0, len(groups), COLUMNS):
        shown = groups[start : start + COLUMNS]
        first = [found.balanced[ranks[0]] for ranks in shown]
        rows = [(kind, *(f"{rank.kinds[kind] / GB:.2f}" for rank in first)) for kind in kinds]
        rows.append(("all", *(f"{rank.total / GB:.2f}" for rank in first)))
        if found.imbalanced is not None:
            over = [f"{found.imbalanced[rank.pp_rank].total / GB:.2f}" for rank in first]
            rows.append((f"all at {imbalance_of(found.config):g} times", *over))
        lines += ["", table(("GB of pipeline rank", *map(ranges, shown)), rows)]
    absent = [f"{kind} {size / GB:.2f}" for kind, size in most.left_out.items() if size]
    if absent:
        lines += [f"never there together with those of rank {most.pp_rank}, and smaller: {', '.join(absent)}"]
    return "\n".join([*lines, "", *_stages(found.config)])


def _keys(config: TrainConfig) -> str:
    """What ranks that share sequences send each other, beside ring attention's, and hold of whole sequences."""
    a, recipe, cp, tokens = config.model.attention, config.recipe, config.parallel.cp, config.rank_tokens
    row, ring = row_bytes(a, recipe), ring_row_bytes(a, recipe)
    heads = key_heads_at_once(a, recipe, tokens * cp)
    whole = whole_keys_bytes(a, recipe, cp, heads) * tokens * cp
    return (
        f"{cp} ranks share a sequence, {config.seq_len // cp:,} tokens each. A layer gathers {row:,.0f} bytes a token "
        f"({ring:,.0f} where keys and values of all heads travel), a rank receives "
        f"{row * tokens * (cp - 1) / 1e6:,.1f} MB;\nwhile it runs, keys, values and their gradients of "
        f"{tokens * cp:,} tokens take {whole / GB:.1f} GB, {heads} heads of keys at once"
    )


def _alike(found: Prediction) -> list[list[int]]:
    """Pipeline ranks that need the same to 10 MB of every kind stand together."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank in found.balanced:
        key = tuple(f"{rank.kinds[kind] / GB:.2f}" for kind in KINDS)
        groups.setdefault(key, []).append(rank.pp_rank)
    return list(groups.values())


def ranges(numbers: Sequence[int]) -> str:
    """1,2,3,7 as 1-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _stages(config: TrainConfig) -> list[str]:
    """A line for all pipeline ranks that hold the same stages."""
    stages, parallel = stages_of(config), config.parallel
    least, _ = microbatches(parallel.schedule, parallel.pp)  # who holds what is the same for any number
    schedule = build_schedule(parallel.schedule, parallel.pp, least)
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank in range(parallel.pp):
        holders.setdefault(tuple(sorted({stage for _, stage in schedule.held_by(rank)})), []).append(rank)
    return [
        f"pipeline rank {ranges(ranks)}: {'; '.join(str(stages[index]) for index in held)}; "
        f"{rank_parameters(config.model, [stages[index] for index in held], config.ep) / 1e9:.3f}e9 parameters"
        for held, ranks in holders.items()
    ]


def _imbalanced(found: Prediction) -> str:
    if found.imbalanced is None:
        return "parallel.max_imbalance=null limits no rank's rows: uneven routing needs more, without a bound"
    most, limit = worst_rank(found.imbalanced), memory_of(found.cluster)
    verdict = "fits too" if most.total <= limit else "does not fit"
    return (
        f"where a rank receives {imbalance_of(found.config):g} times an even share: {verdict}, rank {most.pp_rank} "
        f"needs {most.total / GB:.1f} GB"
    )


def _time(found: Prediction) -> str:
    time = found.time
    rows = [
        (part.name, f"{part.seconds:.4g}", f"{part.seconds / time.seconds:.1%}", part.source) for part in time.parts
    ]
    header = ("part of a step", "seconds", "share", "from")
    return "\n".join([f"{time.seconds:.4g} seconds a step of {short(time.tokens)} tokens", table(header, rows)])


def _run(found: Prediction) -> str:
    time, cluster, tokens = found.time, found.cluster, found.tokens
    whole = time.tokens_per_second_per_gpu * cluster.gpus
    return "\n".join(
        [
            f"{time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {short(whole)} tokens/s in all",
            f"MFU {time.mfu:.1%} (causal), {time.mfu_noncausal:.1%} (non-causal) of {cluster.bf16_tflops:g} TFLOPS",
            f"communication hidden {time.hidden:.1%}, exposed {time.exposed_communication_seconds:.3g} s; bubble "
            f"{time.bubble:.1%}; optimizer {time.optimizer_seconds:.3g} s",
            f"{short(tokens)} tokens: {time.days(tokens):.3g} days, {time.gpu_hours(tokens):,.0f} GPU hours, "
            f"${time.cost(tokens):,.0f} at ${cluster.price_per_gpu_hour:g} a GPU hour",
        ]
    )
