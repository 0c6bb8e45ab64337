"""Checkpoints: how long one in the background holds training up, what hashing costs, and the host's peak memory.

    python -m benchmarks.bench_checkpoint [--megabytes 256] [--compute 0.5] [--json FILE]

One process saves a state of that size to a temporary folder, ratios to a save that training waits for in the same run.
`blocked` is what the training thread loses by a save in the background: the call that starts it, and what is left of
the copy after the next forward and backward, for which the thread sleeps `--compute` seconds, as a host that waits for
its GPU. `copy` is the time of the copy, `background` that of the whole save. `hash` is the time spent in the hash, `no
hash` a save with a hash that does nothing. `check` is the time of the look for numbers that are not finite, which a
save in the background does in its thread.

Memory is what VmHWM grows by in a process of its own, beside the state itself, against the documented bound: the
rank's state where it is copied, and `SLACK` for what is read or written at once.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from fp8moe.train.checkpoint import CheckpointConfig, Saver, complete, hashed_file, load, saver
from fp8moe.train.finite_state import not_finite

TENSORS = 4  # few and large: whoever holds one of them beside the state is seen
BASELINE = "waiting"


SLACK = 16 * 2**20  # bytes: a piece, buffers of the process, what planning allocates
XXH3 = hashed_file.xxhash.xxh3_128


class NoHash:
    """Stands for a hash that costs nothing."""

    def update(self, data: bytes) -> None:
        """Ignore the data."""

    def hexdigest(self) -> str:
        """Nothing was hashed."""
        return ""


class TimedHash:
    """The hash, with the seconds that it took."""

    seconds = 0.0

    def __init__(self) -> None:
        self._digest = XXH3()

    def update(self, data: bytes) -> None:
        """Hash the data."""
        started = time.perf_counter()
        self._digest.update(data)
        TimedHash.seconds += time.perf_counter() - started

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._digest.hexdigest()


class Bench:
    """Saves one state again and again; compute: seconds of a forward and backward."""

    def __init__(self, folder: Path, megabytes: int, compute: float = 0.0) -> None:
        values = megabytes * 2**20 // 4 // TENSORS
        self._state = {f"master.{i}": torch.randn(values) for i in range(TENSORS)}
        self._folder, self._step, self._compute = folder, 0, compute
        self.blocked: list[float] = []
        self.copied: list[float] = []
        self.hashed: list[float] = []
        self.checked: list[float] = []

    def _tensors(self, hold: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
        return {name: hold(tensor) for name, tensor in self._state.items()}

    def _saver(self, *, background: bool) -> Saver:
        config = CheckpointConfig(keep=1, background=background)
        return Saver(self._folder / str(background), config, is_first=True, group=None)

    def _check(self, tensors: Mapping[str, Sequence[Tensor]]) -> list[str]:
        started = time.perf_counter()
        found = not_finite(tensors)
        self.checked.append(time.perf_counter() - started)
        return found

    def waiting(self) -> None:
        """A save that training waits for."""
        self._step += 1
        TimedHash.seconds = 0.0
        with patch.object(hashed_file.xxhash, "xxh3_128", TimedHash), patch.object(saver, "not_finite", self._check):
            self._saver(background=False).start(self._step, "{}", self._tensors)
        self.hashed.append(TimedHash.seconds)

    def without_hash(self) -> None:
        """The same with a hash that does nothing."""
        self._step += 1
        with patch.object(hashed_file.xxhash, "xxh3_128", NoHash):
            self._saver(background=False).start(self._step, "{}", self._tensors)

    def background(self) -> None:
        """A save beside the training; notes how long training was held up, and how long the copy took."""
        self._step += 1
        background, started = self._saver(background=True), time.perf_counter()

        def tensors(hold: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
            copies = self._tensors(hold)
            self.copied.append(time.perf_counter() - started)
            return copies

        background.start(self._step, "{}", tensors)
        begun = time.perf_counter()
        time.sleep(self._compute)
        left = time.perf_counter()
        background.wait_copied()
        self.blocked.append(begun - started + time.perf_counter() - left)
        background.wait()

    def load(self) -> None:
        """Load the last checkpoint that training waited for into the state."""
        load(complete(self._folder / "False")[-1], self._state)


def peak_memory() -> int:
    """Most bytes of memory that this process has had so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(megabytes: int, folder: Path) -> dict[str, tuple[int, int]]:
    """By what is done: bytes that the peak grew by, and the bound. In a fresh process, least first: peaks only grow."""
    Bench(folder / "small", 1).waiting()  # imports and buffers of the first time
    bench = Bench(folder, megabytes)
    grown = {}
    for name, call, bound in (
        ("save", bench.waiting, SLACK),
        ("load", bench.load, SLACK),
        ("background save", bench.background, megabytes * 2**20 + SLACK),
    ):
        before = peak_memory()
        call()
        grown[name] = (peak_memory() - before, bound)
    return grown


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Checkpoints in the background, and their hashes", repeats=9, warmup=1)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state (%(default)s)")
    parser.add_argument("--compute", type=float, default=0.5, help="seconds of a forward and backward (%(default)s)")
    arguments = parse_arguments(parser, argv)
    report = Report(torch.device("cpu"), json_path=arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.megabytes, arguments.compute)
        calls = {BASELINE: bench.waiting, "no hash": bench.without_hash, "background": bench.background}
        seconds = alternate(calls, torch.device("cpu"), trials=arguments.repeats, warmup=arguments.warmup)
    shape, kept = f"{arguments.megabytes} MB", len(seconds[BASELINE])
    seconds |= {"blocked": bench.blocked[-kept:], "copy": bench.copied[-kept:], "hash": bench.hashed[-kept:]}
    seconds["check"] = bench.checked[-kept:]
    for name, times in seconds.items():
        ratio = None if name == BASELINE else paired_ratio(times, seconds[BASELINE])
        baseline = None if ratio is None else BASELINE
        report.add(name, shape, "time", summarize(times).median * 1e3, "ms", baseline=baseline, ratio=ratio)
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, (grown, bound) in pool.apply(memory, (arguments.megabytes, Path(folder))).items():
            report.add(f"memory of a {name}", shape, "peak", grown / 2**20, "MB", baseline="bound", ratio=grown / bound)
    report.finish()


if __name__ == "__main__":
    main()
