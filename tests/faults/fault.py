"""A kind of fault, and the outcome of its trials."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Trial = Callable[[random.Random, Path, list[str]], str | None]


@dataclass(frozen=True)
class Fault:
    """trial(random, folder, corpus) -> what was lost, None where nothing was; NotHereError where it can't be made.

    kind: its name on the command line. trials, short: how many in each form.
    """

    kind: str
    name: str
    trial: Trial
    trials: int
    short: int


class NotHereError(Exception):
    """This machine does not allow what a trial needs; says what."""


@dataclass
class Outcome:
    """What became of a fault's trials; lost: a sentence for each that a run did not survive. skipped: why, if so."""

    name: str
    trials: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def row(self) -> str:
        lost = "nothing" if not self.lost else f"{self.lost[0]} ({len(self.lost)} in all)"
        survived = self.trials - len(self.lost)
        return f"{self.name:42} {self.trials:6} {survived:9} {self.seconds:8.1f}  {self.skipped or lost}"
