"""Metrics of each step, written to `metrics.jsonl` and handed to the run's trackers (`train.trackers`).

One line of JSON a step (`train.json_lines`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fp8moe.train.json_lines import METRICS, JsonLines, finite
from fp8moe.train.trackers import LoggingConfig, Trackers

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on this rank, by part.

    exposed_communication: what compute waited for messages. checkpoint: what training waited for the checkpoint of the
    step before, since the line of a step is written before its own.
    backward: of micro-batches that are CUDA graphs (`train.captured`) the forward too.
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


class MetricsWriter:
    """Appends a record a step to `run_dir/metrics.jsonl`, and hands it to the trackers; only rank 0 has one.

    after_step: the step that a resumed run continues from; records of later steps, by an earlier attempt, are removed.
    warn: is given one sentence where a tracker fails.
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
        self._lines = JsonLines(run_dir / METRICS)
        self._lines.keep_until(after_step)
        self._trackers = Trackers(run_dir, config, name, settings, after_step, warn)

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which are done again."""
        self._lines.keep_until(step)
        self._trackers.forget_after(step)

    def note_checkpoint(self, step: int) -> None:
        """A checkpoint of that step is complete."""
        self._trackers.note_checkpoint(step)

    def write(
        self, report: StepReport, extra: Mapping[str, Any], totals: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Log one step; `extra`: what only some steps have, such as a validation loss. totals: of the run so far."""
        record = {**asdict(report), **extra}
        self._lines.append(record)
        self._trackers.log(record, report.step, totals)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the trackers with `summary`, or as failed without one; a second call does nothing."""
        self._trackers.close(None if summary is None else finite(summary))
