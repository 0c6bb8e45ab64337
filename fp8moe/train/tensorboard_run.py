"""A run's figures for TensorBoard: event files in `run_dir/tensorboard`, by torch's own writer.

    tensorboard --logdir runs

shows all runs below `runs`. A start writes a file of its own. One that goes on after step N, by a resume or a rollback,
says so in its first record (`purge_step`), and TensorBoard passes over what earlier files have of later steps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
FLUSH_SECONDS = 5  # after which a step can be seen at the latest


class TensorBoardRun:
    """Writes the run's event files. problem: why nothing is written any more; "" while all is well."""

    def __init__(self, run_dir: Path, name: str, settings: Mapping[str, Any], after_step: int) -> None:
        self.problem, self._folder = "", run_dir / FOLDER
        self._writer = self._open(after_step if self._folder.exists() else None)
        self._writer.add_text(name, f"```json\n{json.dumps(settings, indent=1, default=str)}\n```", after_step)

    def _open(self, after_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if after_step is None else after_step + 1
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the figures of a step, each by its name. Raises OSError where the disk took none of the last ones."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def forget_after(self, step: int) -> None:
        """Begin a file that takes the place of what the others have of later steps."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def stop(self) -> None:
        """Close the file whatever is left to write."""
        with contextlib.suppress(Exception):
            self._writer.close()
