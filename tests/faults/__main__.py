"""A table of faults: how many trials of each, how many a run survived, and what the others lost.

    python -m tests.faults [--short] [--kinds save,signal] [--trials N] [--minutes M] [--seed N]

Ends with 1 where something was lost. No trial begins after so many minutes; a row counts those that were made.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.fault import Fault, NotHereError, Outcome
from tests.faults.kinds import FAULTS
from tests.train.runs import write_corpus


def put(fault: Fault, trials: int, seed: int, folder: Path, corpus: list[str], deadline: float = math.inf) -> Outcome:
    """Make some trials of a fault; trial number n is the same in every form and at every time.

    None begins when the monotonic clock has passed `deadline`.
    """
    outcome, start = Outcome(fault.name), time.monotonic()
    for number in range(trials):
        if time.monotonic() > deadline:
            break
        here = folder / f"{fault.kind}-{number}"
        here.mkdir()
        try:
            lost = fault.trial(random.Random(f"{seed} {fault.kind} {number}"), here, corpus)
        except NotHereError as reason:
            outcome.skipped = str(reason)
            break
        except TimeoutError as error:
            lost = str(error)
        outcome.trials += 1
        if lost is not None:
            outcome.lost.append(f"trial {number}: {lost}")
        shutil.rmtree(here)
    outcome.seconds = time.monotonic() - start
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Make the trials and print the table."""
    kinds = [fault.kind for fault in FAULTS]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few trials of each")
    parser.add_argument("--kinds", default=",".join(kinds), help="which, with commas between (default: %(default)s)")
    parser.add_argument("--trials", type=int, help="of each kind, in place of its own number")
    parser.add_argument("--minutes", type=float, default=44.0, help="that all may take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    chosen = arguments.kinds.split(",")
    if unknown := [kind for kind in chosen if kind not in kinds]:
        parser.error(f"--kinds {','.join(unknown)}: use {', '.join(kinds)}")
    print(f"{'fault':42} {'trials':>6} {'survived':>9} {'seconds':>8}  lost")
    lost, deadline = 0, time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpus").mkdir()
        corpus = write_corpus(Path(folder) / "corpus")
        for fault in FAULTS:
            own = fault.short if arguments.short else fault.trials
            trials = own if arguments.trials is None else arguments.trials
            if fault.kind in chosen and trials:
                outcome = put(fault, trials, arguments.seed, Path(folder), corpus, deadline)
                print(outcome.row, flush=True)
                for sentence in outcome.lost[1:]:
                    print(f"  {sentence}", flush=True)
                lost += len(outcome.lost)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
