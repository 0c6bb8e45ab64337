"""Disks: the newest checkpoint damaged, and a file system that fills up while a checkpoint is written."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fp8moe.errors import EXIT
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import Location
from tests.faults.fault import NotHereError
from tests.faults.runs import end_differs, newest, start, undisturbed, wait_until, went_on

SIZE = 32 << 20  # bytes of the file system that fills up
UNMOUNTED_WITHIN = 10.0  # seconds
SPACE = re.compile(r"checkpoint \S*/step-\d+ can.t be written \(.*needs [\d.e+-]+ GB and [\d.e+-]+ GB are free\)")
LOADS = "takes weights from "  # what a rank of `corrupted` prints before it does
MANIFEST = "manifest.json"


def corrupted(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """The newest checkpoint is damaged in one file: it is named before a weight is set, and the one before taken."""
    expected = undisturbed(corpus, 1, folder)
    run_dir = folder / "run"
    shutil.copytree(expected.run_dir, run_dir)
    before, path, last = [Path(str(one)) for one in checkpoint.complete(run_dir / "checkpoints")][-3:]
    shutil.rmtree(last)  # as of a run that was killed after the save before
    file, how = damage(rng, path)
    ranks = start([*corpus, f"run_dir={run_dir}"], 1, folder / "start", _says_what_it_loads)
    if (codes := ranks.wait()) != [0]:
        return f"{file} {how}: exit code {codes[0]}: {ranks.sentence()}"
    named, _, rest = ranks.said().partition(LOADS)
    if not rest.startswith(f"{before}\n") or LOADS in rest:
        return f"{file} {how}: weights were taken from {rest.splitlines()[:1]}"
    # Without its manifest a checkpoint is one that was not finished; a damaged manifest may blame a file that it lists.
    if (file, how) != (MANIFEST, "missing"):
        wrong = r"\S+" if file == MANIFEST else re.escape(file)
        if not re.search(rf"^checkpoint {re.escape(str(path))}: {wrong} .*damaged and passed over$", named, re.M):
            return f"{file} {how}: not named before weights were set: {named[-200:]!r}"
    return end_differs(run_dir, expected)


def _says_what_it_loads(rank: int) -> None:
    load = checkpoint.load

    def told(path: Location, tensors: Mapping[str, object], *rest: object) -> None:
        print(f"{LOADS}{path}", flush=True)
        load(path, tensors, *rest)  # type: ignore[arg-type]

    checkpoint.load = told  # type: ignore[assignment]


def damage(rng: random.Random, path: Path) -> tuple[str, str]:
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
    return file.name, how


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of SIZE bytes while the block runs. Raises NotHereError where none may be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, timeout=UNMOUNTED_WITHIN).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        raise NotHereError("skipped: this user may not mount a file system, which the fault needs")
    try:
        yield folder
    finally:
        deadline = time.monotonic() + UNMOUNTED_WITHIN
        while subprocess.run(["umount", str(folder)], capture_output=True).returncode and os.path.ismount(folder):
            if time.monotonic() > deadline:
                subprocess.run(["umount", "--lazy", str(folder)], check=True)
                break
            time.sleep(0.1)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves `left` bytes of the disk, in whole pages."""
    ballast = disk / "ballast"
    taken = max(4096, shutil.disk_usage(disk).free - left)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, taken)
    return ballast


def disk_full(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """The disk fills up after a random checkpoint, with room for a random number of the next one's writes."""
    expected = undisturbed(corpus, 2, folder)
    with small_disk(folder / "disk") as disk:
        run_dir, step = disk / "run", rng.choice((2, 4))
        ranks = start([*corpus, f"run_dir={run_dir}"], 2, folder / "first")
        if not wait_until(lambda: (run_dir / "checkpoints" / f"step-{step}").is_dir(), ranks):
            return f"the run ended before: {ranks.sentence()}"
        whole = newest(run_dir)
        assert whole is not None
        size = sum(file.stat().st_size for file in whole.iterdir())
        # The tensors do not fit; or they do, and a small file behind them does not; or not even a line of a log does.
        left = rng.choice((rng.randrange(size), size - rng.randrange(1 << 16), rng.randrange(1 << 13)))
        ballast = fill(disk, left)
        codes = ranks.wait()
        if EXIT["space"] not in codes or not set(codes) <= {EXIT["space"], 1}:
            return f"exit codes {codes}: {ranks.said()}"
        said = next(ranks.said(rank) for rank in (0, 1) if codes[rank] == EXIT["space"])
        if "Traceback" in said or not SPACE.search(said):
            return f"what was said: {said[-300:]!r}"
        kept = newest(run_dir)
        if kept is None or checkpoint.problems(kept):
            return "the checkpoint before is damaged"
        ballast.unlink()
        return went_on(corpus, 2, folder / "second", run_dir, expected)
