"""A simulated schedule for machines: its numbers as JSON, and as a Chrome trace for Perfetto or chrome://tracing."""

from typing import Any

from fp8moe.plan.schedule_text import label
from fp8moe.schedule.action import Action, Kind
from fp8moe.schedule.simulate import Costs, Timed, Timeline

MICROSECONDS = 1000.0  # a cost unit is drawn as one millisecond


def _costs(costs: Costs) -> dict[str, Any]:
    stages = None if costs.stages is None else [float(share) for share in costs.stages]
    return {
        "F": float(costs.forward),
        "B": float(costs.backward),
        "W": float(costs.weight),
        "FB": float(costs.pair),
        "message": float(costs.message),
        "stages": stages,
    }


def _where(action: Action) -> dict[str, Any]:
    return {"stage": action.stage, "microbatch": action.microbatch, "direction": action.direction}


def _record(timed: Timed) -> dict[str, Any]:
    """kind, where, start, end; `parts` says what a computation does of F, B and W; `peer` is a message's other end."""
    action = timed.action
    record: dict[str, Any] = {"kind": action.kind.value, **_where(action)}
    record |= {"start": float(timed.start), "end": float(timed.end), "phase": action.phase}
    if action.kind.is_message:
        record["peer"] = action.peer
        return record
    record["parts"] = [
        {"kind": kind.value, "stage": stage, "microbatch": microbatch, "direction": direction}
        for kind, stage, microbatch, direction in action.parts()
    ]
    if action.paired is not None:
        record["forward"], record["backward"] = _where(action), _where(action.paired)
    return record


def as_json(timeline: Timeline) -> dict[str, Any]:
    """Everything the simulator knows: sizes, costs, makespan, bubble and peak activations per rank, actions per rank.

    Times are in the costs' unit. `actions[rank]` is in start order; for SEND and RECV start is when it was sent or
    posted, end when the message arrived. A rank's `bubble` is makespan minus what it computes.
    """
    schedule = timeline.schedule
    return {
        "name": schedule.name,
        "pp": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "placement": [list(ranks) for ranks in schedule.placement],
        "phases": list(schedule.phases),
        "cost": _costs(timeline.costs),
        "makespan": float(timeline.makespan),
        "bubble": [float(bubble) for bubble in timeline.bubble],
        "peak_activations": [int(peak) for peak in timeline.peak_activations],
        "actions": [[_record(timed) for timed in rank] for rank in timeline.ranks],
    }


def _slices(timeline: Timeline, rank: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    held = 0
    for timed in timeline.ranks[rank]:
        action = timed.action
        if action.kind.is_message:
            continue
        start, duration = float(timed.start) * MICROSECONDS, float(timed.end - timed.start) * MICROSECONDS
        event = {"ph": "X", "pid": 0, "tid": rank, "ts": start, "dur": duration, "cat": action.kind.value}
        title = timeline.schedule.phases[action.phase - 1] if action.phase else ""
        args = {"stage": action.stage, "microbatch": action.microbatch, "direction": action.direction, "phase": title}
        if action.paired is not None:
            args |= {"backward_stage": action.paired.stage, "backward_microbatch": action.paired.microbatch}
        events.append({**event, "name": label(timeline.schedule, action), "args": args})
        kinds = [kind for kind, *_ in action.parts()]
        for kind, step, time in ((Kind.F, 1, start), (Kind.W, -1, start + duration)):
            if kind in kinds:
                held += step
                count = {"ph": "C", "pid": 0, "tid": rank, "ts": time, "name": f"held by rank {rank}"}
                events.append({**count, "args": {"stage-activations": held}})
    return events


def _flows(timeline: Timeline) -> list[dict[str, Any]]:
    """An arrow a message, from the computation that makes it to the one that waits for it."""
    made: dict[tuple[Kind, int, int], tuple[int, Timed]] = {}
    for rank, cells in enumerate(timeline.ranks):
        for timed in cells:
            for kind, stage, microbatch, _ in timed.action.parts():
                made[kind, stage, microbatch] = (rank, timed)
    events: list[dict[str, Any]] = []
    for cells in timeline.ranks:
        for timed in cells:
            action = timed.action
            if not action.kind.is_send:
                continue
            part, step = (Kind.F, 1) if action.kind is Kind.SEND_F else (Kind.B, -1)
            ends = (
                ("s", made[part, action.stage, action.microbatch], 0.999),
                ("f", made[part, action.stage + step, action.microbatch], 0.001),
            )
            name = "activation" if part is Kind.F else "gradient"
            identity = f"{name} {action.stage} {action.microbatch}"
            for phase, (rank, cell), within in ends:
                # Inside the slice, or the viewer does not know which slice the arrow touches.
                at = (float(cell.start) + within * float(cell.end - cell.start)) * MICROSECONDS
                event = {"ph": phase, "pid": 0, "tid": rank, "ts": at, "id": identity, "name": name, "cat": "message"}
                events.append(event | ({"bp": "e"} if phase == "f" else {}))
    return events


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Trace Event Format: a track a rank, arrows for messages, a counter of held activations; 1 cost unit = 1 ms."""
    schedule = timeline.schedule
    title = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches"
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for rank in range(schedule.num_ranks):
        stages = ", ".join(str(stage) for stage in sorted({stage for _, stage in schedule.held_by(rank)}))
        name = {"name": f"rank {rank} (stages {stages})"}
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": name})
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
        events += _slices(timeline, rank)
    return {"traceEvents": [*events, *_flows(timeline)], "displayTimeUnit": "ms"}
