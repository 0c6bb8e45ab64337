"""Checkpoints: how long training is held up by one in the background, and what hashing costs, as ratios in one run.

    python -m benchmarks.bench_checkpoint [--megabytes 256] [--json FILE]

One process saves a state of that size to a temporary folder. `background` is the time until `start` returns, which is
what the training thread loses; the copy and the writing go on beside it. `copy` is the time until the optimizer may
change the state, if it had nothing to compute meanwhile. `no hash` saves with a hash that does nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from fp8moe.train.checkpoint import CheckpointConfig, Saver, hashed_file

TENSORS = 64
BASELINE = "waiting"


class NoHash:
    """Stands for a hash that costs nothing."""

    def update(self, data: bytes) -> None:
        """Ignore the data."""

    def hexdigest(self) -> str:
        """Nothing was hashed."""
        return ""


class Bench:
    """Saves one state again and again."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        values = megabytes * 2**20 // 4 // TENSORS
        self._state = {f"master.{i}": torch.randn(values) for i in range(TENSORS)}
        self._folder, self._step = folder, 0
        self._background: Saver | None = None
        self.blocked: list[float] = []
        self.copied: list[float] = []

    def _tensors(self, hold: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
        return {name: hold(tensor) for name, tensor in self._state.items()}

    def _saver(self, *, background: bool) -> Saver:
        config = CheckpointConfig(keep=1, background=background)
        return Saver(self._folder / str(background), config, is_first=True, group=None)

    def waiting(self) -> None:
        """A save that training waits for."""
        self._step += 1
        self._saver(background=False).start(self._step, "{}", self._tensors)

    def without_hash(self) -> None:
        """The same with a hash that does nothing."""
        with patch.object(hashed_file.xxhash, "xxh3_128", NoHash):
            self.waiting()

    def background(self) -> None:
        """A save beside the training; notes when `start` returned and when the copy was there."""
        self._step += 1
        saver, started = self._saver(background=True), time.perf_counter()
        saver.start(self._step, "{}", self._tensors)
        self.blocked.append(time.perf_counter() - started)
        saver.wait_copied()
        self.copied.append(time.perf_counter() - started)
        saver.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Checkpoints in the background, and their hashes", repeats=9, warmup=1)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state (%(default)s)")
    arguments = parse_arguments(parser, argv)
    report = Report(torch.device("cpu"), json_path=arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.megabytes)
        calls = {BASELINE: bench.waiting, "no hash": bench.without_hash, "background": bench.background}
        seconds = alternate(calls, torch.device("cpu"), trials=arguments.repeats, warmup=arguments.warmup)
    shape, kept = f"{arguments.megabytes} MB", len(seconds[BASELINE])
    seconds |= {"blocked": bench.blocked[-kept:], "copy": bench.copied[-kept:]}
    for name, times in seconds.items():
        ratio = None if name == BASELINE else paired_ratio(times, seconds[BASELINE])
        baseline = None if ratio is None else BASELINE
        report.add(name, shape, "time", summarize(times).median * 1e3, "ms", baseline=baseline, ratio=ratio)
    report.finish()


if __name__ == "__main__":
    main()
