"""Events of a run, one a line of `run_dir/events.jsonl`: what a reader of its curves must know, with the step and time.

    start       versions, commit, world_size, device, data     checkpoint  a complete one
    skipped     a step that changed nothing                    straggler   a rank that works longer than others
    warning     any other sentence of warning                  trace       figures of the recorded step
    rollback    to a checkpoint                                end, failure, preempted: how this start ended

An event of a step goes when the step is undone, as its metrics do; those of a start (ATTEMPT) stay, since they did
happen: a run that was resumed from step 30 has the failure in step 40 on record.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import torch

from fp8moe.train.json_lines import EVENTS, JsonLines
from fp8moe.train.provenance import commit, versions
from fp8moe.train.run import Run

ATTEMPT = ("start", "rollback", "end", "failure", "preempted")
KINDS = (*ATTEMPT, "checkpoint", "skipped", "straggler", "warning", "trace")


def started_as(run: Run) -> tuple[str, dict[str, Any]]:
    """A sentence on this start of `run`, and what it runs on and reads."""
    world_size, device = run.mesh.world_size, run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    more = {"versions": versions(), "commit": commit(), "world_size": world_size, "device": name}
    whence = f"goes on after step {run.step}" if run.step else "begins"
    more |= {"host": socket.gethostname(), "data": run.identity.as_stored()}
    return f"{whence} on {world_size} x {name}", more


class EventLog:
    """Appends events of a run; only rank 0 has one. after_step: the step that a resumed run continues from."""

    def __init__(self, run_dir: Path, after_step: int) -> None:
        self._lines = JsonLines(run_dir / EVENTS)
        self.forget_after(after_step)

    def forget_after(self, step: int) -> None:
        """Remove the events of later steps, which are done again."""
        self._lines.keep_until(step, keep=lambda event: event.get("kind") in ATTEMPT)

    def note(self, kind: str, step: int, text: str, **more: Any) -> None:
        """Write an event of one of KINDS after `step`, with a sentence and what else is known of it."""
        assert kind in KINDS, kind
        self._lines.append({"step": step, "time": time.time(), "kind": kind, "text": text, **more})
