"""Metrics of each step, written to `metrics.jsonl` always and to wandb when configured.

One line of JSON a step (`train.json_lines`). wandb runs in a process of its own (`train.wandb_run`), only when it is
configured, and logs offline where no key is set; it never ends a run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.limits import COUNT, POSITIVE, check_fields
from fp8moe.train.json_lines import METRICS, JsonLines, finite
from fp8moe.train.wandb_run import WandbRun, is_installed

DETAIL_RECORDS = 50  # of a run where experts_every is null: 58 layers of 256 experts take 4 MB
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggingConfig:
    """How often progress is shown, and what is measured and logged.

    every: steps between plain progress lines. experts_every: steps between records of each expert's load and each
    rank's memory and working time (`train.detail`; null: 50 in a run, 0: none). fp8_every: steps between counts of
    saturated and underflowed FP8 values (0: on the last step only). wandb: also log to Weights & Biases, in project
    `wandb_project`.
    """

    every: int = 10
    fp8_every: int = 0
    experts_every: int | None = None
    wandb: bool = False
    wandb_project: str = "fp8moe"

    def __post_init__(self) -> None:
        check_fields(self, "logging", every=POSITIVE, fp8_every=COUNT, experts_every=COUNT)

    def fp8_is_due(self, step: int, steps: int) -> bool:
        """Whether step number `step` (from 1) of `steps` counts what FP8 casts lose; the last always does."""
        return step == steps or (self.fp8_every > 0 and step % self.fp8_every == 0)

    def experts_are_due(self, step: int, steps: int) -> bool:
        """Whether each expert's load is recorded after step number `step` of `steps`; the last always is, if any."""
        every = max(1, math.ceil(steps / DETAIL_RECORDS)) if self.experts_every is None else self.experts_every
        return every > 0 and (step % every == 0 or step == steps)


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on this rank, by part.

    exposed_communication: what compute waited for messages. checkpoint: what training waited for the checkpoint of the
    step before, since the line of a step is written before its own.
    """

    data: float
    forward: float
    backward: float
    exposed_communication: float
    optimizer: float
    checkpoint: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """Figures of one step; `step` counts from 1.

    loss, mtp_loss: nats a predicted token of the global batch; aux_loss: balance loss a sequence; the last two are None
    where the model has none. tokens: predicted tokens of the global batch. tokens_per_second: of the whole job; mfu: of
    one GPU (None on a CPU). max_violation: the worst layer's. The FP8 shares, of the step's casts and by kind of tensor
    (activations, gradients, weights; the casts of weights are the last update's), are None where they were not counted.
    skipped_samples: the first and the last sample of a skipped step; None of any other.
    """

    step: int
    loss: float
    mtp_loss: float | None
    aux_loss: float | None
    grad_norm: float
    lr: float
    skipped: bool
    tokens: int
    consumed_samples: int
    tokens_per_second: float
    mfu: float | None
    max_violation: float | None
    fp8_saturated_share: float | None
    fp8_underflow_share: float | None
    seconds: float
    time: StepSeconds
    memory_bytes: int
    skipped_samples: tuple[int, int] | None = None
    fp8_saturated_by_kind: dict[str, float] | None = None
    fp8_underflow_by_kind: dict[str, float] | None = None


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without nesting, as dashboards take it: `time/forward` for `forward` of `time`."""
    single = {key: value for key, value in record.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in record.items() if isinstance(value, Mapping)}
    return single | {f"{group}/{key}": value for group, items in groups.items() for key, value in items.items()}


def check_wandb(config: LoggingConfig) -> None:
    """Raises ConfigError when wandb is configured and not installed."""
    if config.wandb and not is_installed():
        raise ConfigError(
            "logging.wandb=true needs the package wandb, which is not installed: pip install 'fp8moe[wandb]', or use "
            "logging.wandb=false"
        )


class MetricsWriter:
    """Appends a record a step to `run_dir/metrics.jsonl`, and to wandb when configured; only rank 0 has one.

    after_step: the step that a resumed run continues from; records of later steps, by an earlier attempt, are removed.
    warn: is given one sentence, once, where wandb fails.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        name: str,
        settings: Mapping[str, Any],
        after_step: int,
        warn: Callable[[str], None] = _logger.warning,
    ):
        self._lines, self._warn = JsonLines(run_dir / METRICS), warn
        self._lines.keep_until(after_step)
        self._wandb: WandbRun | None = None
        if config.wandb:
            check_wandb(config)
            try:
                self._wandb = WandbRun(run_dir, config.wandb_project, name, settings)
            except OSError as error:  # no more processes, or no space for the file of its id
                self._give_up(str(error))

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which are done again."""
        self._lines.keep_until(step)

    def write(self, report: StepReport, extra: Mapping[str, Any]) -> None:
        """Log one step; `extra` holds what only some steps have, such as a validation loss."""
        record = finite({**asdict(report), **extra})
        self._lines.append(record)
        if self._wandb is not None:
            self._wandb.log(flat(record), step=report.step)
            if self._wandb.problem:
                self._wandb.stop()
                self._give_up(self._wandb.problem)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Finish wandb's run with `summary`, or as failed without one."""
        if self._wandb is not None:
            self._wandb.close(None if summary is None else finite(summary))
            if self._wandb.problem:
                self._give_up(self._wandb.problem)
            self._wandb = None

    def _give_up(self, reason: str) -> None:
        self._wandb = None
        self._warn(f"wandb logs no more ({reason.rstrip('.')}): the run goes on, metrics.jsonl has every step")
