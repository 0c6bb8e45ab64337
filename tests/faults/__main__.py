"""A table of faults: how many trials of each, how many a run survived, and what the others lost.

    python -m tests.faults [--short] [--only WORDS] [--seed N]

Ends with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.kinds import FAULTS, Fault
from tests.train.runs import write_corpus


@dataclass
class Outcome:
    """What became of a fault's trials; lost: a sentence for each that a run did not survive."""

    name: str
    trials: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        lost = "nothing" if not self.lost else f"{self.lost[0]} ({len(self.lost)} in all)"
        survived = self.trials - len(self.lost)
        return f"{self.name:34} {self.trials:6} {survived:9} {self.seconds:8.1f}  {lost}"


def put(fault: Fault, trials: int, seed: int, folder: Path, corpus: list[str]) -> Outcome:
    """Make some trials of a fault; trial number n is the same in every form and at every time."""
    outcome, start = Outcome(fault.name), time.monotonic()
    for number in range(trials):
        here = folder / f"{fault.name.replace(' ', '-')}-{number}"
        here.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):  # a trial's warnings are expected
            lost = fault.trial(random.Random(f"{seed} {fault.name} {number}"), here, corpus)
        outcome.trials += 1
        if lost is not None:
            outcome.lost.append(f"trial {number}: {lost}")
    outcome.seconds = time.monotonic() - start
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Make the trials and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few trials of each")
    parser.add_argument("--only", default="", help="faults whose names hold these words")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(f"{'fault':34} {'trials':>6} {'survived':>9} {'seconds':>8}  lost")
    logging.disable(logging.WARNING)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpus").mkdir()
        corpus = write_corpus(Path(folder) / "corpus")
        for fault in FAULTS:
            if arguments.only in fault.name:
                trials = fault.short if arguments.short else fault.trials
                outcome = put(fault, trials, arguments.seed, Path(folder), corpus)
                print(outcome.row, flush=True)
                lost += len(outcome.lost)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
