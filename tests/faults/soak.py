"""A soak: a thousand steps with a fault every twenty seconds that must not lose any, and the time that it cost."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path

from fp8moe.errors import EXIT
from fp8moe.train import checkpoint
from tests.faults.disks import damage, fill, small_disk
from tests.faults.fault import NotHereError
from tests.faults.runs import LIMIT, Ranks, final_bytes, start, steps, undisturbed, wait_until

SOAK = ("steps=1000", "checkpoint.every=20", "parallel.timeout=10", "optimizer.schedule.peak=1e-3")
STARTS = 60  # that a soak may take
SOAK_LIMIT = 1800.0  # seconds of the undisturbed run
BETWEEN = (15.0, 25.0)  # seconds from one fault to the next
FREEZES_FOR = (1.0, 4.0)  # seconds of a freeze that a run gets over
KINDS = ("kill", "signal", "freeze", "freeze for good", "damage", "full disk")


def soaked(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """A thousand steps of two ranks under faults: the same bits at the end as without, every step once."""
    expected = undisturbed(corpus, 2, folder, *SOAK, limit=SOAK_LIMIT)
    with contextlib.ExitStack() as stack:
        kinds = list(KINDS)
        try:
            run_dir = stack.enter_context(small_disk(folder / "disk")) / "run"
        except NotHereError:
            kinds.remove("full disk")
            run_dir = folder / "run"
        settings, begun, happened = [*corpus, *SOAK, f"run_dir={run_dir}"], time.monotonic(), list[str]()
        for number in range(STARTS):
            ranks = start(settings, 2, folder / f"start-{number}")
            while _runs_for(ranks, rng.uniform(*BETWEEN)):
                happened.append(kind := kinds[len(happened) % len(kinds)])
                if lost := _put(kind, rng, ranks, run_dir):
                    ranks.kill()
                    return f"start {number}, {kind}: {lost}"
                if not ranks.alive:
                    break
            else:
                codes = ranks.wait()
                if codes != [0, 0]:
                    return f"start {number} ended by itself with exit codes {codes}: {ranks.sentence()}"
                break
        else:
            return f"{STARTS} starts were not enough"
        seconds = time.monotonic() - begun
        counts = ", ".join(f"{happened.count(kind)} x {kind}" for kind in kinds)
        print(f"  soak: {counts} in {seconds:.0f} s; the undisturbed run took {expected.seconds:.0f} s: "
              f"{expected.seconds / seconds:.0%} of the time was useful", flush=True)  # fmt: skip
        if steps(run_dir) != list(range(1, 1001)):
            return f"metrics.jsonl has {len(steps(run_dir))} lines"
        return None if final_bytes(run_dir) == expected.bytes else "another end than the undisturbed run's"


def _runs_for(ranks: Ranks, seconds: float) -> bool:
    """Whether a rank is still there after so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not ranks.alive:
            return False
        time.sleep(0.05)
    return ranks.alive


def _put(kind: str, rng: random.Random, ranks: Ranks, run_dir: Path) -> str | None:
    """Make the fault; the ranks have ended afterwards, but for a freeze that they get over -> what was lost."""
    victim, other = rng.sample((0, 1), 2)
    if kind == "freeze":
        ranks.send(victim, signal.SIGSTOP)
        time.sleep(rng.uniform(*FREEZES_FOR))
        ranks.send(victim, signal.SIGCONT)
        return None
    if kind == "freeze for good":
        wait_until(lambda: "  loss " in ranks.said(), ranks)  # before its first step a run waits for startup_timeout
        if not ranks.alive:
            return None
        ranks.send(victim, signal.SIGSTOP)
        ranks.processes[other].join(LIMIT)
        code = ranks.processes[other].exitcode
        ranks.kill()
        return None if code in (EXIT["hang"], 0) else f"beside a frozen rank the other ended with {code}"
    if kind == "signal":
        ranks.send(victim, signal.SIGTERM)
        codes = ranks.wait()
        return None if codes in ([EXIT["preempted"]] * 2, [0, 0]) else f"exit codes {codes}: {ranks.sentence()}"
    if kind == "full disk":
        disk = run_dir.parent
        ballast = fill(disk, rng.randrange(1, 200_000))
        codes = ranks.wait()
        ballast.unlink()
        return None if EXIT["space"] in codes or codes == [0, 0] else f"exit codes {codes}: {ranks.sentence()}"
    ranks.processes[victim].kill()
    ranks.kill()
    whole = checkpoint.complete(run_dir / "checkpoints")
    if kind == "damage" and len(whole) > 1:
        damage(rng, Path(str(whole[-1])))
    return None
