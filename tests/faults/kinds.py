"""The kinds of faults: each makes one trial of a fault and says what was lost, or nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from fp8moe.errors import EXIT, DataError
from fp8moe.parallel.mesh import build_mesh
from fp8moe.train import checkpoint
from tests.faults.runs import LIMIT, SETTINGS, final_bytes, start, wait_until
from tests.train.runs import configured


@dataclass(frozen=True)
class Fault:
    """trial(random, folder, corpus) -> what was lost, None where nothing was. trials, short: how many in each form."""

    name: str
    trial: Callable[[random.Random, Path, list[str]], str | None]
    trials: int
    short: int


@dataclass(frozen=True)
class Undisturbed:
    """A run without faults: its directory, the hashes of its end, and how long it took."""

    run_dir: Path
    bytes: dict[str, str]
    seconds: float


_undisturbed: dict[tuple[str, ...], Undisturbed] = {}


def undisturbed(corpus: list[str], world_size: int, folder: Path, *more: str, limit: float = LIMIT) -> Undisturbed:
    """The run of the same settings without faults; made once."""
    key = (str(folder.parent), str(world_size), *more)
    if key not in _undisturbed:
        name, begun = f"undisturbed-{len(_undisturbed)}", time.monotonic()
        run_dir = folder.parent / name
        settings = [*corpus, *SETTINGS, *more, f"run_dir={run_dir}"]
        codes = start(settings, world_size, folder.parent / f"{name}-start").wait(limit)
        assert codes == [0] * world_size, codes
        _undisturbed[key] = Undisturbed(run_dir, final_bytes(run_dir), time.monotonic() - begun)
    return _undisturbed[key]


def killed_around_a_save(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """kill -9 of one of two ranks while a checkpoint is written or just was; then the run goes on."""
    expected = undisturbed(corpus, 2, folder).bytes
    run_dir, step = folder / "run", rng.choice((2, 4, 6))
    root = run_dir / "checkpoints"
    settings = [*corpus, *SETTINGS, f"run_dir={run_dir}"]
    ranks = start(settings, 2, folder / "first")
    happened = wait_until(lambda: (root / f"step-{step}.tmp").exists() or (root / f"step-{step}").exists(), ranks)
    time.sleep(rng.random() * 0.05)
    rng.choice(ranks.processes).kill()
    ranks.kill()
    assert happened, "no checkpoint was begun"
    latest = root / "latest"
    if latest.exists() and not checkpoint.is_complete(root / latest.read_text().strip()):
        return "latest names a checkpoint that is not whole"
    codes = start([*settings, "resume=auto"], 2, folder / "second").wait()
    if codes != [0, 0]:
        return f"the run did not go on: exit codes {codes}"
    return None if final_bytes(run_dir) == expected else "another end than the undisturbed run's"


def corrupted(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """The newest checkpoint of a run is damaged in one file; what a start would take."""
    run_dir = folder / "run"
    shutil.copytree(undisturbed(corpus, 1, folder).run_dir, run_dir)
    before, newest = [Path(str(path)) for path in checkpoint.complete(run_dir / "checkpoints")][-2:]
    said = damage(rng, newest)
    config = configured(corpus, *SETTINGS, "steps=9")
    mesh = build_mesh(1, 1, 1, timeout=timedelta(seconds=60))
    try:
        chosen = checkpoint.choose(
            "auto", run_dir, None, config.model, mesh, seed=config.seed, seq_len=config.seq_len, optimizer="adamw"
        )
    except DataError as error:
        return f"{said}: nothing was found ({error})"
    if chosen is None or Path(str(chosen[0])) != before:
        return f"{said}: {chosen and chosen[0]} was taken"
    return None


def damage(rng: random.Random, path: Path) -> str:
    """Flip a bit of one file of a checkpoint, cut one off, or delete one -> which, and how."""
    file = rng.choice(sorted(path.iterdir()))
    how = rng.choice(("flipped", "cut off", "missing"))
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{file.name} {how}"


SOAK = ("steps=1000", "checkpoint.every=20", "parallel.timeout=10", "optimizer.schedule.peak=1e-3")
STARTS = 60  # that a soak may take
SOAK_LIMIT = 900.0  # seconds of the undisturbed run


def soaked(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """A thousand steps of two ranks with a fault every few seconds: kills, freezes, damaged newest checkpoints."""
    expected = undisturbed(corpus, 2, folder, *SOAK, limit=SOAK_LIMIT)
    run_dir, begun = folder / "run", time.monotonic()
    settings = [*corpus, *SETTINGS, *SOAK, f"run_dir={run_dir}", "resume=auto"]
    for number in range(STARTS):
        ranks = start(settings, 2, folder / f"start-{number}")
        until = time.monotonic() + rng.uniform(8, 20)
        while time.monotonic() < until and any(process.is_alive() for process in ranks.processes):
            time.sleep(0.05)
        if not any(process.is_alive() for process in ranks.processes):
            codes = ranks.wait()
            if codes != [0, 0]:
                return f"start {number} ended by itself with exit codes {codes}"
            break
        fault = rng.choice(("kill", "freeze", "damage"))
        victim, other = rng.sample(ranks.processes, 2)
        if fault == "freeze":
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGSTOP)
            other.join(LIMIT)
            if other.exitcode != EXIT["hang"]:
                ranks.kill()
                return f"start {number}: beside a frozen rank the other ended with {other.exitcode}"
        else:
            victim.kill()
        ranks.kill()
        whole = checkpoint.complete(run_dir / "checkpoints")
        if fault == "damage" and len(whole) > 1:
            damage(rng, Path(str(whole[-1])))
    else:
        return f"{STARTS} starts were not enough"
    seconds = time.monotonic() - begun
    print(f"soak: {number} faults in {seconds:.0f} s; the undisturbed run took {expected.seconds:.0f} s, "
          f"{expected.seconds / seconds:.0%} of it")  # fmt: skip
    return None if final_bytes(run_dir) == expected.bytes else "another end than the undisturbed run's"


FAULTS = (
    Fault("a rank killed around a save", killed_around_a_save, 100, 2),
    Fault("the newest checkpoint damaged", corrupted, 100, 20),
    Fault("a soak of a thousand steps", soaked, 1, 0),
)
