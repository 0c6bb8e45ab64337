"""A run's latest figures as a text file for Prometheus, written anew after each step (`logging.prometheus`).

The format is that of node_exporter's textfile collector, which reads every `*.prom` of its folders: a HELP and a TYPE
line and one sample for each figure, with the run's name as label. A figure that only some steps have, such as the
validation loss, keeps its last value. Times are Unix seconds, so that `time() - fp8moe_last_checkpoint_time_seconds` is
a checkpoint's age at the moment of the question; an age written by the run would stand still once the run hangs.

The file is written under another name and renamed: a reader sees the old or the new one. It is not flushed to disk, for
after a crash it is of no use. A disk that refuses it is told of once, and tried again at the next step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp8moe import __version__
from fp8moe.data.durable import scratch_name
from fp8moe.train.metric_names import MEANING, prometheus_name

FILE = "metrics.prom"
OF_THE_RUN = {
    "steps": "Optimizer steps that the run is to do",
    "skipped_steps": "Steps skipped in the whole run",
    "rollbacks": "Rollbacks to a checkpoint since the last start",
    "last_step_time_seconds": "Unix time of the end of the last step",
    "last_checkpoint_time_seconds": "Unix time at which the last checkpoint was complete",
    "last_checkpoint_step": "Step of the last checkpoint that this start completed",
    "running": "1 while the run trains, 0 after it ended; a killed run leaves 1 and an old last_step_time_seconds",
}


class PrometheusFile:
    """The file at `path` of the run `name`; `warn` is given one sentence where the file can't be written."""

    def __init__(self, path: Path, name: str, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn, self._is_failing = path, warn, False
        self._label = f'run="{_escaped(name)}"'
        self._info = f'{self._label},run_dir="{_escaped(str(run_dir))}",version="{_escaped(__version__)}"'
        self._values: dict[str, float] = {"running": 1}

    def log(self, values: Mapping[str, float], totals: Mapping[str, float]) -> None:
        """Write the file with the figures of a step and the totals of the run so far."""
        self._values |= {**values, **totals, "last_step_time_seconds": time.time()}
        self._write()

    def note_checkpoint(self, step: int) -> None:
        """A checkpoint is complete now; the file has it from the next step on, and at the end."""
        self._values |= {"last_checkpoint_step": step, "last_checkpoint_time_seconds": time.time()}

    def close(self) -> None:
        """Write the file a last time, of a run that does not train any more."""
        self._values["running"] = 0
        self._write()

    def text(self) -> str:
        """The file's text."""
        lines = [
            "# HELP fp8moe_run_info The run that the other figures are of",
            "# TYPE fp8moe_run_info gauge",
            f"fp8moe_run_info{{{self._info}}} 1",
        ]
        for name, value in sorted(self._values.items()):
            meaning = OF_THE_RUN.get(name) or MEANING.get(name) or f"{name} of metrics.jsonl"
            full = prometheus_name(name)
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} gauge", f"{full}{{{self._label}}} {_number(value)}"]
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        scratch = scratch_name(self._path)
        try:
            try:
                scratch.write_text(self.text(), encoding="utf-8")
                os.replace(scratch, self._path)
            finally:
                scratch.unlink(missing_ok=True)
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                self._warn(
                    f"{self._path} can't be written ({error.strerror or error}): the run goes on and tries it again "
                    "at each step"
                )
            self._is_failing = True


def _number(value: Any) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _escaped(text: str) -> str:
    """A label's value in Prometheus's quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
