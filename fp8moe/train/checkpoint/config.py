"""When a run saves checkpoints, where, and which of them stay."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8moe.limits import Range, check_fields
from fp8moe.train.checkpoint.location import location


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept.

    every: steps between checkpoints (0: none before the end). at_end: one after the last step. keep: how many stay;
    keep_every: those of every so many steps stay as well (0: none). background: written while training goes on.
    path: the folder that holds them, a path or a URL (None: run_dir/checkpoints).
    on_failure: what follows where one can't be written: "stop" ends the run, by default, since training that nothing
    keeps is lost by the next fault; "continue" says so and tries again when the next is due, and only the last one's
    failure ends the run.
    """

    every: int = 0
    at_end: bool = True
    keep: int = 2
    keep_every: int = 0
    background: bool = True
    path: str | None = None
    on_failure: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        check_fields(
            self,
            "checkpoint",
            every=Range(least=0, use="use 0 for none before the end"),
            keep=Range(least=1, use="use 1 for the newest alone"),
            keep_every=Range(least=0, use="use 0 for none"),
        )

    def resolved(self) -> CheckpointConfig:
        """With an absolute path, by which the run is found from any folder."""
        if self.path is None:
            return self
        where = location(self.path)
        return dataclasses.replace(self, path=str(where.absolute() if isinstance(where, Path) else where))

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of that step stays for good."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save after step number `step` (from 1) of `steps`."""
        return (self.at_end and step == steps) or (self.every > 0 and step % self.every == 0)
