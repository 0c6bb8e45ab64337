"""Trace of one step (profile=true): recorded on every rank, written as trace.json and summed up in a few figures.

The third step of an attempt is recorded, or its last if there are fewer: the first compiles, allocates and opens
connections. On a CPU the spans are everything, and torch.profiler, which slows every operator down, stays off; on a GPU
it adds the kernels.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fp8moe.parallel.collectives import clock_offset, gather
from fp8moe.profile.chrome_trace import RankTrace, step_trace
from fp8moe.profile.figures import (
    ACTION,
    RankFigures,
    length,
    num_microbatches,
    overlap,
    rank_figures,
    spans_of,
    times_of,
    waits_of,
    window_of,
)
from fp8moe.profile.kineto import device_figures, profiling
from fp8moe.profile.spans import Recorder, Span, listening
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.simulate import Costs, simulate
from fp8moe.train.run import Run

STEP = 3
TRACE = "trace.json"
SHOWN = {"reduce": "reduce (gradients)"}  # rows of the table that have not the span's name


@dataclass(frozen=True)
class StepFigures:
    """Figures of one step over all ranks, in seconds (`profile.figures` defines them).

    hidden: share of all ranks' expert communication together, and of the rank that hides least; None without any.
    bubble: a rank's on average, the largest, and the simulator's average for the costs measured in this step (None on a
    GPU, where the host's times are not the device's). phases, and parts outside them: of a rank on average, and the
    largest. step_seconds: from the first span to the last, of the rank that took longest.
    """

    step: int
    seconds: float
    hidden: float | None
    hidden_worst: float | None
    bubble: float
    bubble_worst: float
    bubble_simulated: float | None
    phases: dict[str, float]
    phases_worst: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    parts_worst: dict[str, float] = field(default_factory=dict)
    step_seconds: float = 0.0


class StepTrace:
    """Records the step that is to be traced, if any; `figures` are None until then."""

    def __init__(self, run: Run) -> None:
        self._step = min(run.step + STEP, run.config.steps) if run.config.profile else None
        self.figures: StepFigures | None = None

    @contextmanager
    def around(self, run: Run) -> Iterator[None]:
        """Record the step inside if it is the traced one; rank 0 then writes trace.json. Collective over all ranks."""
        if run.step + 1 != self._step:
            yield
            return
        run.barrier()
        recorder = Recorder()
        with listening(recorder), profiling(run.device) as kernels_of:
            yield
        offset = clock_offset(run.mesh.world_group)
        work = kernels_of(recorder.spans)
        mine = RankTrace(
            name_of(run),
            [replace(span, start=span.start + offset, end=span.end + offset) for span in recorder.spans],
            [replace(k, start=k.start + offset, end=k.end + offset, launched=k.launched + offset) for k in work],
        )
        ranks = gather(mine, run.mesh.world_group)
        self.figures = step_figures(run, ranks)
        if run.is_first:
            (run.run_dir / TRACE).write_text(json.dumps(step_trace(ranks)) + "\n", encoding="utf-8")


def name_of(run: Run) -> str:
    """The name of a rank in the trace: its place on the mesh and its stages."""
    mesh, parallel = run.mesh, run.config.parallel
    schedule = build_schedule(parallel.schedule, parallel.pp, run.config.num_microbatches)
    stages = sorted({stage for _, stage in schedule.held_by(mesh.pp_rank)})
    words = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    part = "" if mesh.cp == 1 else f", cp {mesh.cp_rank}"
    return f"rank {mesh.rank} (pp {mesh.pp_rank}, dp {mesh.dp_rank}, ep {mesh.ep_rank}{part}; {words})"


def step_figures(run: Run, ranks: Sequence[RankTrace]) -> StepFigures:
    """The figures of the step that was just done, from the records of all ranks."""
    parallel = run.config.parallel
    recorded = [rank.spans for rank in ranks]
    if any(rank.kernels for rank in ranks):
        each, simulated = [device_figures(rank.kernels, rank.spans) for rank in ranks], None
    else:
        window = window_of(recorded)
        each = [rank_figures(spans, window) for spans in recorded]
        schedule = build_schedule(parallel.schedule, parallel.pp, num_microbatches(recorded))
        simulated = statistics.fmean(simulate(schedule, measured_costs(recorded, schedule.num_stages)).bubble)
    return summed_up(run.step, each, simulated)


def measured_costs(ranks: Sequence[Sequence[Span]], num_stages: int) -> Costs:
    """Mean seconds of a stage's F, B, W and FB, with the waits for experts and without those for other stages.

    F, B and W are measured on actions of their own where a stage has any; the weight gradients in a BW on its phases.
    """
    seconds: dict[str, dict[int, list[float]]] = {kind: defaultdict(list) for kind in ("F", "B", "W")}
    pairs = []
    for spans in ranks:
        between_stages = times_of(waits_of(spans, expert=False))
        late = [span for span in spans_of(spans, "phase") if span.name.startswith("W ")]
        for action in spans_of(spans, "action"):
            match = ACTION.fullmatch(action.name)
            assert match is not None
            kind, stage, back = match.group(1), int(match.group(2)), match.group(4)
            took = action.seconds - length(overlap([(action.start, action.end)], between_stages))
            if back is not None:
                pairs.append(took)
            elif kind == "BW":
                weight = sum(span.seconds for span in late if action.contains(span))
                seconds["W"][stage].append(weight)
                seconds["B"][stage].append(took - weight)
            else:
                seconds[kind][stage].append(took)
    return _costs(seconds, pairs, num_stages)


def _costs(seconds: dict[str, dict[int, list[float]]], pairs: list[float], num_stages: int) -> Costs:
    means = {
        kind: {stage: statistics.fmean(values) for stage, values in stages.items()} for kind, stages in seconds.items()
    }
    forward, back, weight = (statistics.fmean(stages.values()) for stages in means.values())
    shares = None
    if all(len(stages) == num_stages for stages in means.values()):
        totals = [sum(stages[stage] for stages in means.values()) for stage in range(num_stages)]
        shares = tuple(total / statistics.fmean(totals) for total in totals)
    pair = max(forward, back + weight, statistics.fmean(pairs)) if pairs else None
    return Costs(forward, back + weight, weight, pair, stages=shares)


def summed_up(step: int, each: Sequence[RankFigures], simulated: float | None) -> StepFigures:
    """The figures of the job from those of each rank."""
    communication = sum(figures.communication for figures in each)
    exposed = sum(figures.exposed for figures in each)
    phases, parts = _by_name([f.phases for f in each]), _by_name([f.parts for f in each])
    return StepFigures(
        step=step,
        seconds=max(figures.window for figures in each),
        hidden=max(0.0, 1 - exposed / communication) if communication else None,
        hidden_worst=min((f.hidden for f in each if f.hidden is not None), default=None),
        bubble=statistics.fmean(figures.bubble for figures in each),
        bubble_worst=max(figures.bubble for figures in each),
        bubble_simulated=simulated,
        phases={name: statistics.fmean(seconds) for name, seconds in phases.items()},
        phases_worst={name: max(seconds) for name, seconds in phases.items()},
        parts={name: statistics.fmean(seconds) for name, seconds in parts.items()},
        parts_worst={name: max(seconds) for name, seconds in parts.items()},
        step_seconds=max(figures.step for figures in each),
    )


def _by_name(each: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Seconds of all ranks by name; 0 of a rank that has none."""
    names = sorted({name for times in each for name in times})
    return {name: [times.get(name, 0.0) for times in each] for name in names}


def table(figures: StepFigures, trace: Path) -> str:
    """The figures as a table for the end of a run, the longest first; `trace` is the path of trace.json."""
    f = figures
    rows = [(f"trace of step {f.step}", "a rank, on average", "the worst")]
    means, worst = f.phases | f.parts, f.phases_worst | f.parts_worst
    total = sum(means.values())
    for name in sorted(means, key=lambda name: -means[name]):
        share = f"{means[name] / total:6.1%}" if total else ""
        rows.append((SHOWN.get(name, name), f"{means[name] * 1e3:8.1f} ms {share}", f"{worst[name] * 1e3:.1f} ms"))
    rows.append(("whole step", f"{total * 1e3:8.1f} ms", f"{f.step_seconds * 1e3:.1f} ms"))
    if f.hidden is not None and f.hidden_worst is not None:
        rows.append(("communication hidden", f"{f.hidden:.1%}", f"{f.hidden_worst:.1%}"))
    simulated = "" if f.bubble_simulated is None else f" (simulated {f.bubble_simulated * 1e3:.1f} ms)"
    rows.append(("forwards and backwards", f"{f.seconds * 1e3:.1f} ms", ""))
    rows.append(("bubble", f"{f.bubble * 1e3:.1f} ms{simulated}", f"{f.bubble_worst * 1e3:.1f} ms"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([*lines, f"open {trace} at ui.perfetto.dev"])
