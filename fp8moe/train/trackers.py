"""Trackers: where a run's figures go beside `metrics.jsonl`: wandb, TensorBoard and a file for Prometheus.

All get the same names (`train.metric_names`), and none ever ends a run: one that fails, in whatever way, is told of in
one sentence and gets nothing more. wandb runs in a process of its own and logs offline where no key is set
(`train.wandb_run`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fp8moe.errors import ConfigError
from fp8moe.limits import COUNT, POSITIVE, check_fields, shown
from fp8moe.train.metric_names import flat
from fp8moe.train.prometheus import FILE, PrometheusFile
from fp8moe.train.tensorboard_run import TensorBoardRun
from fp8moe.train.wandb_run import WandbRun

DETAIL_RECORDS = 50  # of a run where experts_every is null: 58 layers of 256 experts take 4 MB


@dataclass(frozen=True)
class LoggingConfig:
    """How often progress is shown, and what is measured and logged."""

    every: int = 10  # steps between plain progress lines
    # print what a run is at its start, and its summary and completions at its end; false: its progress alone
    summary: bool = True
    fp8_every: int = 0  # steps between counts of saturated and underflowed FP8 values; 0: on the last step only
    # steps between records of each expert's load and each rank's memory and working time; null: 50 in a run, 0: none
    experts_every: int | None = None
    wandb: bool = False  # also log to Weights & Biases, offline where no key is set
    wandb_project: str = "fp8moe"  # project of Weights & Biases
    tensorboard: bool = False  # also write event files for TensorBoard, into the run directory
    # path of the file for Prometheus's node_exporter, ending in .prom; null: metrics.prom in the run directory
    prometheus: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "logging", every=POSITIVE, fp8_every=COUNT, experts_every=COUNT)
        if self.prometheus is not None and not self.prometheus.endswith(".prom"):
            raise ValueError(
                f"logging.prometheus={shown(self.prometheus)} must end in .prom, node_exporter reads no others: use "
                f"{shown(self.prometheus + '.prom')}"
            )

    def fp8_is_due(self, step: int, steps: int) -> bool:
        """Whether step number `step` (from 1) of `steps` counts what FP8 casts lose; the last always does."""
        return step == steps or (self.fp8_every > 0 and step % self.fp8_every == 0)

    def experts_are_due(self, step: int, steps: int) -> bool:
        """Whether each expert's load is recorded after step number `step` of `steps`; the last always is, if any."""
        every = max(1, math.ceil(steps / DETAIL_RECORDS)) if self.experts_every is None else self.experts_every
        return every > 0 and (step % every == 0 or step == steps)


class Tracker(Protocol):
    """What wandb and TensorBoard have in common here. problem: why nothing is logged any more, "" while all is well."""

    problem: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def forget_after(self, step: int) -> None: ...

    def close(self, summary: Mapping[str, Any] | None) -> None: ...

    def stop(self) -> None: ...


def is_installed(package: str) -> bool:
    """Whether a package is there; a folder of its name, of earlier runs, which Python would import, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def check_trackers(config: LoggingConfig) -> None:
    """Raises ConfigError when a tracker is configured and its package is not installed."""
    for package, is_wanted in (("wandb", config.wandb), ("tensorboard", config.tensorboard)):
        if is_wanted and not is_installed(package):
            raise ConfigError(
                f"logging.{package}=true needs the package {package}, which is not installed: pip install "
                f"'fp8moe[{package}]', or use logging.{package}=false"
            )


class Trackers:
    """The trackers of a run; only rank 0 has them. after_step: the step that a resumed run continues from.

    warn: is given one sentence where a tracker fails.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        name: str,
        settings: Mapping[str, Any],
        after_step: int,
        warn: Callable[[str], None],
    ) -> None:
        check_trackers(config)
        self._warn = warn
        self._prometheus = PrometheusFile(Path(config.prometheus or run_dir / FILE), name, run_dir, warn)
        self._trackers: dict[str, Tracker] = {}
        if config.wandb:
            self._start("wandb", lambda: WandbRun(run_dir, config.wandb_project, name, settings))
        if config.tensorboard:
            self._start("tensorboard", lambda: TensorBoardRun(run_dir, name, settings, after_step))

    def log(self, record: Mapping[str, Any], step: int, totals: Mapping[str, float]) -> None:
        """Log the record of a step; `totals` of the run are for Prometheus, which keeps no history."""
        values = flat(record)
        self._each(lambda tracker: tracker.log(values, step))
        self._prometheus.log(values, totals)

    def note_checkpoint(self, step: int) -> None:
        """A checkpoint of that step is complete."""
        self._prometheus.note_checkpoint(step)

    def forget_after(self, step: int) -> None:
        """Later steps are done again."""
        self._each(lambda tracker: tracker.forget_after(step))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End all with the run's summary, or as failed without one."""
        self._each(lambda tracker: tracker.close(summary))
        self._trackers.clear()
        self._prometheus.close()

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._trackers[name] = make()
        except Exception as error:  # no more processes, no space, or anything that the package raises
            self._tell(name, str(error) or type(error).__name__)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                tracker.problem = str(error) or type(error).__name__
            if tracker.problem:
                tracker.stop()
                del self._trackers[name]
                self._tell(name, tracker.problem)

    def _tell(self, name: str, reason: str) -> None:
        reason = " ".join(reason.split()).rstrip(".")
        self._warn(f"{name} logs no more ({reason}): the run goes on, metrics.jsonl has every step")
