"""When a run saves checkpoints, where, and which of them stay."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8moe.limits import Range, check_fields
from fp8moe.train.checkpoint.location import location, refuse_password


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    every: int = 0  # steps between checkpoints; 0: none before the end
    at_end: bool = True  # save one after the last step
    keep: int = 2  # how many stay: the newest
    keep_every: int = 0  # those of every so many steps stay as well; 0: none
    background: bool = True  # written while training goes on; false: training waits
    path: str | None = None  # the folder that holds them, a path or a URL; None: run_dir/checkpoints
    # where one can't be written: stop ends the run, since training that nothing keeps is lost by the next
    # fault; continue says so and tries again when the next is due, and only the last one's failure ends the run
    on_failure: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        check_fields(
            self,
            "checkpoint",
            every=Range(least=0, use="use 0 for none before the end"),
            keep=Range(least=1, use="use 1 for the newest alone"),
            keep_every=Range(least=0, use="use 0 for none"),
        )
        refuse_password("checkpoint.path", self.path)

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
