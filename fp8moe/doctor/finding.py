"""Findings: what each check of the doctor has to say, as text and as JSON, and what of it is to be fixed.

A finding that prevents a run (STOP) makes the exit code 2; one that only makes it slow or fragile (ADVICE) is listed
with what to do and leaves 0. What several ranks find alike is said once, with their numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fp8moe.parallel.place import listed_ranks


class Level(StrEnum):
    """What follows from a finding: nothing, advice, or no run."""

    OK = "ok"
    ADVICE = "advice"
    STOP = "stop"


MARKS = {Level.OK: " ", Level.ADVICE: "!", Level.STOP: "X"}


@dataclass(frozen=True)
class Finding:
    """One line of a part (versions, host, ...). fix: a sentence with the command, for all levels but OK.

    node: the host that it is about, where not the rank that found it.
    """

    part: str
    text: str
    level: Level = Level.OK
    fix: str = ""
    node: str = ""


@dataclass(frozen=True)
class Found:
    """A finding with the ranks that have it. whose: '' where that needs no word, else 'rank 1 (node01, gpu 1): '."""

    finding: Finding
    ranks: tuple[int, ...]
    whose: str


@dataclass(frozen=True)
class Report:
    """What all ranks have found, in the order of the checks, and tables of figures."""

    found: tuple[Found, ...]
    world_size: int
    figures: dict[str, Any] = field(default_factory=dict)

    def of_level(self, level: Level) -> list[Found]:
        """The findings of that level."""
        return [one for one in self.found if one.finding.level is level]

    def as_json(self) -> dict[str, Any]:
        """`findings` (part, text, level, fix, node, ranks), `figures` and `world_size`."""
        listed = [{**dataclasses.asdict(one.finding), "ranks": list(one.ranks)} for one in self.found]
        return {"world_size": self.world_size, "findings": listed, "figures": self.figures}

    def as_text(self) -> str:
        """The parts with their lines, and what to fix: first what prevents a run."""
        lines, part = [], ""
        for one in self.found:
            if one.finding.part != part:
                part = one.finding.part
                lines.append(part)
            lines.append(f"  {MARKS[one.finding.level]} {one.whose}{one.finding.text}")
        wrong = [*self.of_level(Level.STOP), *self.of_level(Level.ADVICE)]
        if not wrong:
            return "\n".join([*lines, "nothing to fix"])
        lines.append("to fix (X: prevents a run)")
        for number, one in enumerate(wrong, 1):
            lines.append(f"  {number}. {MARKS[one.finding.level]} {one.whose}{one.finding.fix}")
        return "\n".join(lines)


def merged(of_ranks: Sequence[Sequence[Finding]], num_hosts: int, figures: dict[str, Any]) -> Report:
    """One report of every rank's findings. Of those that are fine only rank 0's are kept, the rest would repeat it."""
    by: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(of_ranks):
        for finding in findings:
            by.setdefault(finding, []).append(rank)
    everyone = list(range(len(of_ranks)))
    kept = []
    for finding, ranks in by.items():
        if finding.level is Level.OK and 0 in ranks:
            kept.append(Found(finding, tuple(everyone), ""))
        elif finding.level is not Level.OK:
            whose = "" if ranks == everyone else f"rank{'s'[: len(ranks) > 1]} {listed_ranks(ranks)}: "
            if finding.node:
                whose = f"{finding.node}: " if num_hosts > 1 else ""
            kept.append(Found(finding, tuple(ranks), whose))
    parts = list(dict.fromkeys(finding.part for finding in by))
    return Report(tuple(sorted(kept, key=lambda one: parts.index(one.finding.part))), len(of_ranks), figures)
