"""Figures of what a step and a rank consist of: time by part, memory and work by rank, phases, load by expert."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from fp8moe.report.figure import Figure, Trace, line, named, over_tokens
from fp8moe.report.run_files import Record, RunFiles
from fp8moe.report.series import Drawn

PARTS = {
    "forward": ("forward", "#4f8fcd"),
    "backward": ("backward", "#2c5f94"),
    "exposed_communication": ("waiting for messages", "#dd7733"),
    "optimizer": ("optimizer", "#35996b"),
    "data": ("data", "#8d6cc0"),
    "checkpoint": ("checkpoint", "#a9803f"),
}
EVEN = 1.0  # the load of each expert in a balanced layer
MOST_LOAD = 3.0  # of an even share, at which the colours of the heat map end


def step_time(runs: list[Drawn]) -> Figure | None:
    """Seconds of a step by part: stacked over tokens of one run, its mean of several."""
    timed = [run for run in runs if any(record.get("time") for record in run.steps)]
    if not timed:
        return None
    if len(runs) > 1:
        data = [
            {
                "type": "bar",
                "orientation": "h",
                "name": words,
                "y": [run.label for run in timed],
                "x": [mean_of_part(run.files, part) for run in timed],
                "marker": {"color": colour},
                "hovertemplate": "%{x:.3~s}s",
            }
            for part, (words, colour) in PARTS.items()
        ]
        layout: dict[str, Any] = {"barmode": "stack", "xaxis": {"title": {"text": "seconds"}}, "hovermode": "y unified"}
        layout["yaxis"] = {"autorange": "reversed", "automargin": True}
        return Figure("step_time", "Time of a step", "mean of all steps but the first, on rank 0", data, layout)
    (run,) = timed
    data = []
    for part, (words, colour) in PARTS.items():
        x, y, steps = run.series(_part(part))
        area = {"stackgroup": "time", "line": {"color": colour, "width": 0.6}, "fillcolor": colour, "mode": "lines"}
        data.append(line(run, x, y, steps, ".3~s", words, **area))
        data[-1]["hovertemplate"] = "%{y:.3~s}s"
    totals = [sum(filter(None, record["time"].values())) for record in run.steps if record.get("time")]
    layout = over_tokens("seconds", rangemode="tozero")
    note = "on rank 0"
    if len(totals) > 2 and max(totals) > 2 * (most := sorted(totals[1:])[int(0.98 * (len(totals) - 2))]):
        layout["yaxis"] |= {"range": [0, 1.15 * most]}
        note += f"; the axis leaves out the slowest steps, up to {max(totals):.3g} s"
    return Figure("step_time", "Time of a step", note, data, layout)


def _part(part: str) -> Callable[[Record], Any]:
    return lambda record: (record.get("time") or {}).get(part)


def mean_of_part(files: RunFiles, part: str) -> float:
    """Mean seconds of a part of a step, without the first step, which compiles and allocates."""
    records = files.metrics[1:] or files.metrics
    values = [(record.get("time") or {}).get(part) for record in records]
    return statistics.fmean([value for value in values if value is not None] or [0.0])


def ranks(runs: list[Drawn]) -> list[Figure]:
    """Memory and working time of every rank, of the last record; of rank 0 where an older run recorded no others."""
    memory, working = [], []
    for run in runs:
        last = run.files.ranks[-1] if run.files.ranks else {}
        peaks = last.get("memory_bytes") or [record.get("memory_bytes") or 0 for record in run.files.metrics[-1:]]
        memory.append((run, [value / 1e9 for value in peaks]))
        working.append((run, last.get("working_seconds") or []))
    figures = []
    if any(any(values) for _, values in memory):
        on_record = any(run.files.ranks for run in runs)
        note = "the most that each has held" if on_record else "rank 0's, the only one on record"
        figures.append(_by_rank("memory", "Memory by rank", note, runs, memory, "GB"))
    if max(len(values) for _, values in working) > 1:
        note = "mean of a step, without waiting for messages, since the record before"
        figures.append(_by_rank("working", "Working time by rank", note, runs, working, "seconds"))
    return figures


def _by_rank(
    name: str, title: str, note: str, runs: list[Drawn], values: list[tuple[Drawn, list[float]]], unit: str
) -> Figure:
    """Bars over ranks; beside each other where no run has more than one rank."""
    is_flat = all(len(of_ranks) <= 1 for _, of_ranks in values)
    data: list[Trace] = []
    for run, of_ranks in values:
        ranks = [f"rank {rank}" if is_flat else str(rank) for rank in range(len(of_ranks))]
        whose = named(runs, run, "")
        hover = f"%{{y}}: %{{x:.4~g}} {unit}" if is_flat else f"rank %{{x}}: %{{y:.4~g}} {unit}"
        hover += f"<extra>{whose}</extra>"
        bars = {"y": ranks, "x": of_ranks, "orientation": "h"} if is_flat else {"x": ranks, "y": of_ranks}
        data.append({"type": "bar", "name": whose, **bars, "marker": {"color": run.colour}, "hovertemplate": hover})
    across: dict[str, Any] = (
        {"type": "category"} if is_flat else {"title": {"text": "rank"}, "type": "category", "nticks": 9}
    )
    across["tickangle"] = 0
    along = {"title": {"text": unit}, "rangemode": "tozero"}
    layout: dict[str, Any] = {"bargap": 0.15, "hovermode": "closest"}
    layout |= {"xaxis": along, "yaxis": across} if is_flat else {"xaxis": across, "yaxis": along}
    if is_flat:
        layout["height"] = 110 + 30 * len(runs)
    return Figure(name, title, note, data, layout)


def trace_figures(files: RunFiles) -> Record | None:
    """Figures of the recorded step (`train.step_trace.StepFigures`): of the newest event, or of the summary."""
    found = [event["figures"] for event in files.events if event.get("kind") == "trace" and event.get("figures")]
    return found[-1] if found else (files.summary or {}).get("trace")


def phases(runs: list[Drawn]) -> Figure | None:
    """Time of a rank in each phase of the recorded step, on average and of the slowest."""
    data = []
    for run in runs:
        figures = trace_figures(run.files)
        if not figures or not figures.get("phases"):
            continue
        names = sorted(figures["phases"], key=lambda name: figures["phases"][name])
        worst = [figures["phases_worst"][name] - figures["phases"][name] for name in names]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": named(runs, run, ""),
                "y": names,
                "x": [figures["phases"][name] for name in names],
                "error_x": {
                    "array": worst,
                    "arrayminus": [0.0] * len(worst),
                    "thickness": 1,
                    "width": 2,
                    "color": "#7c8794",
                },
                "marker": {"color": run.colour},
                "hovertemplate": f"%{{y}}: %{{x:.3~s}}s<extra>{run.label if len(runs) > 1 else ''}</extra>",
            }
        )
    if not data:
        return None
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}, "hovermode": "closest"}
    layout["yaxis"] = {"automargin": True, "dtick": 1}
    layout["height"] = max(280, 90 + 19 * max(len(trace["y"]) for trace in data) * len(data))
    return Figure(
        "phases", "Phases of the recorded step", "of a rank on average; the line ends at the slowest rank", data, layout
    )


def loads(runs: list[Drawn]) -> list[Figure]:
    """The load of each expert of each layer, over time: a heat map a run, with a slider."""
    figures = []
    for number, run in enumerate(runs):
        records = [record for record in run.files.expert_load if record.get("layers")]
        if not records:
            continue
        layers = list(records[-1]["layers"])
        frames = [
            {
                "label": f"steps {record['first_step']:,} to {record['step']:,}",
                "z": [record["layers"].get(name) for name in layers],
            }
            for record in records
        ]
        heat = {
            "type": "heatmap",
            "z": frames[-1]["z"],
            "y": [layer_name(name) for name in layers],
            "zmin": 0,
            "zmid": EVEN,
            "zmax": MOST_LOAD,
            "xgap": 1 if len(frames[-1]["z"][0] or ()) <= 64 else 0,
            "ygap": 1 if len(layers) <= 64 else 0,
            "colorbar": {
                "thickness": 10,
                "outlinewidth": 0,
                "tickvals": [0, 1, 2, 3],
                "ticktext": ["0", "even", "2x", "3x"],
            },
            "hovertemplate": "%{y}, expert %{x}: %{z:.2f} x even<extra></extra>",
        }
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "expert"}, "tickformat": "d", "showgrid": False},
            "hovermode": "closest",
        }
        layout["yaxis"] = {"autorange": "reversed", "automargin": True, "showgrid": False, "type": "category"}
        layout["height"] = min(720, max(260, 120 + (26 if len(layers) < 24 else 9) * len(layers)))
        title = "Load of the experts" if len(runs) == 1 else f"Load of the experts: {run.label}"
        note = "tokens over the mean expert's, between two records"
        figures.append(Figure(f"experts-{number}", title, note, [heat], layout, wide=True, frames=frames))
    return figures


def layer_name(router: str) -> str:
    """A router's canonical name in two words: `block 3`, `MTP block`."""
    parts = router.split(".")
    return (
        f"block {parts[1]}" if len(parts) > 1 and parts[1].isdigit() else "MTP block" if parts[0] == "mtp" else router
    )
