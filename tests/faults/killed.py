"""Processes that end or stop: a rank killed around a save, signals, a launcher that is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fp8moe.errors import EXIT
from fp8moe.parallel.place import process_state
from fp8moe.train import checkpoint
from tests.faults.runs import LIMIT, SETTINGS, newest, start, steps, undisturbed, wait_until, went_on

TWENTY = ("steps=20", "checkpoint.every=0", "lr_schedule=constant")
STOPS_WITHIN = 25.0  # seconds from a signal to the end of the last rank
ORPHANS_WITHIN = 10.0  # seconds from the end of a launcher to that of its workers


def killed_around_a_save(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """kill -9 of one of two ranks while a checkpoint is written or just was; then the run goes on."""
    expected = undisturbed(corpus, 2, folder)
    run_dir, step = folder / "run", rng.choice((2, 4, 6))
    root = run_dir / "checkpoints"
    ranks = start([*corpus, f"run_dir={run_dir}"], 2, folder / "first")
    happened = wait_until(lambda: (root / f"step-{step}.tmp").exists() or (root / f"step-{step}").exists(), ranks)
    time.sleep(rng.random() * 0.05)
    rng.choice(ranks.processes).kill()
    ranks.kill()
    assert happened, f"no checkpoint was begun: {ranks.said()}"
    latest = root / "latest"
    if latest.exists() and not checkpoint.is_complete(root / latest.read_text().strip()):
        return "latest names a checkpoint that is not whole"
    return went_on(corpus, 2, folder / "second", run_dir, expected)


def signalled(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """SIGTERM or SIGUSR1 to one of two ranks at any moment from the start on: what is saved, and the run's end."""
    expected = undisturbed(corpus, 2, folder, *TWENTY)
    run_dir, settings = folder / "run", [*corpus, *TWENTY]
    ranks = start([*settings, f"run_dir={run_dir}"], 2, folder / "first")
    if is_early := rng.random() < 0.2:  # before ranks know each other all get it: a launcher ends them together
        time.sleep(rng.uniform(0.1, 1.5))
    else:
        step = rng.randrange(1, 17)
        wait_until(lambda: len(steps(run_dir)) >= step, ranks)
        time.sleep(rng.uniform(0.0, 0.3))
    done, sent = len(steps(run_dir)), time.monotonic()
    number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1))
    for rank in (0, 1) if is_early else (rng.randrange(2),):
        ranks.send(rank, number)
    codes = ranks.wait(STOPS_WITHIN + 10)
    if not set(codes) <= ({EXIT["preempted"], -number} if is_early else {EXIT["preempted"]}):
        return f"signalled after step {done}: exit codes {codes}: {ranks.sentence()}"
    if time.monotonic() - sent > STOPS_WITHIN:
        return f"it took {time.monotonic() - sent:.0f} s to end"
    path = newest(run_dir)
    saved = 0 if path is None else int(path.name.removeprefix("step-"))
    if saved < done or steps(run_dir) != list(range(1, saved + 1)):
        return f"of {done} steps {saved} were saved, metrics.jsonl has {steps(run_dir)}"
    return went_on(settings, 2, folder / "second", run_dir, expected)


def launcher_killed(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """kill -9 of `fp8moe train --nproc 2` as its workers start or train: none is left 10 seconds later."""
    run_dir = folder / "run"
    words = [*SETTINGS, *corpus, "steps=100000", f"run_dir={run_dir}"]
    environment = os.environ | {"TMPDIR": str(folder)}
    with open(folder / "said.txt", "w") as said:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "fp8moe", "train", "--nproc", "2", *words],
            stdout=said, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        workers: dict[int, str] = {}
        deadline = time.monotonic() + LIMIT
        trains = rng.random() < 0.7
        while len(workers) < 2 or (trains and not steps(run_dir)):
            if time.monotonic() > deadline or launcher.poll() is not None:
                return f"no worker was started: {(folder / 'said.txt').read_text()[-300:]}"
            workers |= {pid: process_state(pid)[1] for pid in below(launcher.pid)}
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.5 if trains else 2.0))
        workers |= {pid: process_state(pid)[1] for pid in below(launcher.pid)}
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + ORPHANS_WITHIN
        while left := [pid for pid, started in workers.items() if lives(pid, started)]:
            if time.monotonic() > deadline:
                return f"{len(left)} processes outlive their launcher by {ORPHANS_WITHIN:g} s"
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()
        for pid, started in workers.items():
            if lives(pid, started):
                os.kill(pid, signal.SIGKILL)
    return None


def lives(pid: int, started: str) -> bool:
    """Whether the process of that number and start time is there, and no zombie."""
    state, since = process_state(pid)
    return since == started and state not in ("", "Z")


def below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) if entry.name.isdecimal() else 0
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(entry.name), *below(int(entry.name))]
    return found
