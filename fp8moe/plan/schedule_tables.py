"""Tables of schedules: captions, all schedules at one cost, a model's ranks, and DeepSeek-V3's published step.

The published figures are seconds of one step of 15,360 sequences of 4,096 tokens on 2,048 H800 (PP16 x EP64, DualPipe,
so 120 micro-batches of one sequence a pipeline), from Table 4 of the ISCA 2025 hardware paper: forward chunks, backward
chunks and weight-gradient chunks that run alone, overlapped pairs, bubble, optimizer.

The paper does not say which rank was timed. The first rank is assumed: it runs 23 forwards, 15 split and 8 whole
backwards, 15 weight gradients and 97 pairs, and with these counts W is 0.22 of a pair, which agrees with the published
kernel times of a layer (FP8 GEMM 57.5 % of the time, a third of it weight gradients). With the middle rank's counts
(17, 8 and 9, 8, 103) W would be 0.44 of a pair, more than all of its weight-gradient GEMMs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8moe.errors import ConfigError
from fp8moe.schedule.action import Kind, Schedule
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, Timeline, peak_held, published_bubble, simulate

if TYPE_CHECKING:  # they load torch, which takes seconds that tables without a model need not wait for
    from fp8moe.model.config import ModelConfig
    from fp8moe.model.memory import MicroBatch
    from fp8moe.model.partition import Stage

NUM_RANKS, NUM_MICROBATCHES, RANK = 16, 120, 0  # of the published step; RANK is the rank assumed to be timed
STEP = 19.926
PUBLISHED = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def format_costs(costs: Costs) -> str:
    """Costs as text: `F=1 B=2 W=1 F&B=2.6 message=0`."""
    return (
        f"F={costs.forward:.4g} B={costs.backward:.4g} W={costs.weight:.4g} F&B={costs.pair:.4g} "
        f"message={costs.message:.4g}"
    )


def caption(timeline: Timeline) -> list[str]:
    """Lines under a picture: sizes and costs; bubble beside the published formula; memory."""
    schedule, costs = timeline.schedule, timeline.costs
    copies = ", each on two ranks" if schedule.num_directions == 2 else ""
    bubble, peaks = timeline.bubble, timeline.peak_activations
    formula = published_bubble(schedule.name, schedule.num_stages, costs)
    share = max(bubble) / timeline.makespan if timeline.makespan else 0.0
    scaled, even = (", stages scaled by their work", " for even stages") if costs.stages is not None else ("", "")
    held = f"{min(peaks):g}" if min(peaks) == max(peaks) else f"{min(peaks):g} to {max(peaks):g}"
    return [
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages{copies}, "
        f"{schedule.num_microbatches} micro-batches; {format_costs(costs)}{scaled}",
        f"makespan {timeline.makespan:.6g}; bubble {max(bubble):.6g} ({share:.1%}) on the rank that waits most, "
        f"{min(bubble):.6g} on the one that waits least; published formula{even} {formula:.6g}",
        f"memory: {held} micro-batches of a stage's activations held at most (a stage is 1/{schedule.num_stages} of "
        f"the model); parameters {schedule.num_directions}x",
    ]


def compare(num_ranks: int, num_microbatches: int, costs: Costs) -> str:
    """Table of all schedules on the same ranks, micro-batches and model.

    costs are those of a stage of 1/num_ranks of the model; DualPipeV's stages are half as large, so its compute times
    are halved (a message keeps its size). Held activations are counted in 1/num_ranks of the model for all. For a
    schedule that does not exist at these sizes the reason stands under the table.
    """
    rows: list[tuple[str, ...]] = []
    reasons = []
    for name in SCHEDULES:
        try:
            schedule = build_schedule(name, num_ranks, num_microbatches)
        except ConfigError as error:
            rows.append((name, *("-",) * 7))
            reasons.append(f"{name}: {error}")
            continue
        share = num_ranks / schedule.num_stages
        own = costs if share == 1 else costs.scaled(share)
        timeline = simulate(schedule, own)
        bubble = max(timeline.bubble)
        rows.append(
            (
                name,
                str(schedule.num_stages),
                f"{timeline.makespan:.5g}",
                f"{bubble:.4g}",
                f"{bubble / timeline.makespan if timeline.makespan else 0:.1%}",
                f"{published_bubble(name, schedule.num_stages, own):.4g}",
                f"{schedule.num_directions}x",
                f"{max(timeline.peak_activations) * share:g}",
            )
        )
    header = ("schedule", "stages", "makespan", "bubble", "share", "formula", "parameters", "held")
    title = (
        f"{num_ranks} ranks, {num_microbatches} micro-batches; {format_costs(costs)} for 1/{num_ranks} of the model "
        f"(dualpipev: halves); held in 1/{num_ranks} of the model"
    )
    return "\n".join([title, table(header, rows), *reasons])


def partition_table(
    config: ModelConfig, stages: tuple[Stage, ...], timeline: Timeline, sizes: MicroBatch, ep: int
) -> str:
    """Table of a model's pipeline ranks: stages, work relative to the average, parameters, peak activations."""
    from fp8moe.model.memory import rank_parameters, stage_activation_bytes
    from fp8moe.model.partition import imbalance, relative_costs

    schedule = timeline.schedule
    costs = relative_costs(config, stages, sizes.seq_len)
    size = [stage_activation_bytes(config, stage, sizes) for stage in stages]
    held = peak_held(schedule, size)
    rows = []
    for rank in range(schedule.num_ranks):
        here = [stages[index] for index in sorted({stage for _, stage in schedule.held_by(rank)})]
        work = sum(costs[stage.index] for stage in here) / len(here)
        rows.append(
            (
                f"rank {rank}",
                f"{work:.3f}",
                f"{rank_parameters(config, here, ep) / 1e9:.3f}",
                f"{held[rank] / 2**30:.2f}",
                f"{timeline.peak_activations[rank]:g}",
                "; ".join(str(stage) for stage in here),
            )
        )
    again = ", ".join(sorted(sizes.recipe.recompute)) or "nothing"
    title = (
        f"{schedule.num_stages} stages of {config.num_layers} blocks, layout "
        f"{','.join(str(stage.num_layers) for stage in stages)}; heaviest rank "
        f"{imbalance(config, stages, sizes.seq_len, schedule.is_folded):.3f} of the average; ep={ep}; activations of "
        f"{sizes.tokens} tokens a micro-batch, {sizes.recipe.precision}, recomputed: {again}"
    )
    header = ("", "work", "parameters (1e9)", "activations (GiB)", "held", "stages")
    return "\n".join([title, table(header, rows)])


def published_table(rows: dict[str, tuple[float, float]]) -> str:
    """Table of simulated and published seconds, phase by phase."""
    lines = [
        (phase, f"{ours:.2f}", f"{theirs:.2f}", f"{ours - theirs:+.2f}", f"{ours / theirs - 1:+.1%}")
        for phase, (ours, theirs) in rows.items()
    ]
    return table(("seconds, first rank", "simulated", "published", "difference", ""), lines)


def published_costs(rank: int = RANK) -> Costs:
    """Seconds of a chunk: each published total over the number of such chunks that `rank` runs.

    1B holds split and whole backwards: with b the input part, 1B = n_B b + n_BW (b + W).
    """
    actions = build_schedule("dualpipe", NUM_RANKS, NUM_MICROBATCHES).actions[rank]
    count = Counter(action.kind for action in actions)
    weight = PUBLISHED["1W"] / count[Kind.W]
    input_part = (PUBLISHED["1B"] - count[Kind.BW] * weight) / (count[Kind.B] + count[Kind.BW])
    return Costs(
        forward=PUBLISHED["1F"] / count[Kind.F],
        backward=input_part + weight,
        weight=weight,
        overlapped=PUBLISHED["1F1B"] / count[Kind.FB],
    )


def is_published(schedule: Schedule) -> bool:
    """Whether this is the schedule of the published step."""
    return (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("dualpipe", NUM_RANKS, NUM_MICROBATCHES)


def beside_published(timeline: Timeline, rank: int = RANK) -> dict[str, tuple[float, float]]:
    """phase -> (simulated, published) seconds on `rank`, the whole step last."""
    spent = timeline.time_by_kind(rank)
    simulated = {
        "1F": spent[Kind.F],
        "bubble": timeline.bubble[rank],
        "1B": spent[Kind.B] + spent[Kind.BW],
        "1W": spent[Kind.W],
        "1F1B": spent[Kind.FB],
        "optimizer": PUBLISHED["optimizer"],
    }
    rows = {phase: (float(simulated[phase]), seconds) for phase, seconds in PUBLISHED.items()}
    return {**rows, "step": (float(timeline.makespan) + PUBLISHED["optimizer"], STEP)}
