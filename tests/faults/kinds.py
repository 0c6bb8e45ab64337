"""The kinds of faults: each makes one trial of a fault and says what was lost, or nothing."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from fp8moe.errors import DataError
from fp8moe.parallel.mesh import build_mesh
from fp8moe.train import checkpoint
from tests.faults.runs import SETTINGS, final_bytes, start, wait_until
from tests.train.runs import configured


@dataclass(frozen=True)
class Fault:
    """trial(random, folder, corpus) -> what was lost, None where nothing was. trials, short: how many in each form."""

    name: str
    trial: Callable[[random.Random, Path, list[str]], str | None]
    trials: int
    short: int


_undisturbed: dict[int, tuple[Path, dict[str, str]]] = {}


def undisturbed(corpus: list[str], world_size: int, folder: Path) -> tuple[Path, dict[str, str]]:
    """The run directory of a run without faults and the hashes of its end; made once."""
    if world_size not in _undisturbed:
        run_dir = folder.parent / f"undisturbed-{world_size}"
        codes = start(
            [*corpus, *SETTINGS, f"run_dir={run_dir}"], world_size, folder.parent / f"start-{world_size}"
        ).wait()
        assert codes == [0] * world_size, codes
        _undisturbed[world_size] = run_dir, final_bytes(run_dir)
    return _undisturbed[world_size]


def killed_around_a_save(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """kill -9 of one of two ranks while a checkpoint is written or just was; then the run goes on."""
    _, expected = undisturbed(corpus, 2, folder)
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
    whole, _ = undisturbed(corpus, 1, folder)
    run_dir = folder / "run"
    shutil.copytree(whole, run_dir)
    before, newest = [Path(str(path)) for path in checkpoint.complete(run_dir / "checkpoints")][-2:]
    file = rng.choice(sorted(newest.iterdir()))
    how = rng.choice(("flipped", "cut off", "missing"))
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    config = configured(corpus, *SETTINGS, "steps=9")
    mesh = build_mesh(1, 1, 1, timeout=timedelta(seconds=60))
    try:
        chosen = checkpoint.choose(
            "auto", run_dir, None, config.model, mesh, seed=config.seed, seq_len=config.seq_len, optimizer="adamw"
        )
    except DataError as error:
        return f"{file.name} {how}: nothing was found ({error})"
    if chosen is None or Path(str(chosen[0])) != before:
        return f"{file.name} {how}: {chosen and chosen[0]} was taken"
    return None


FAULTS = (
    Fault("a rank killed around a save", killed_around_a_save, 100, 2),
    Fault("the newest checkpoint damaged", corrupted, 100, 20),
)
