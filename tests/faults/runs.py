"""Real processes of a small run, forked from this warm one, whose state at the end can be compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from fp8moe.cli.command import explain
from fp8moe.train import checkpoint
from fp8moe.train.loop import run_to_end
from tests.parallel.ranks import TIMEOUT
from tests.train.runs import built, configured

LIMIT = 120.0  # seconds that anything here may take
SETTINGS = (
    *("precision=fp8", "batch.micro_batch=2", "checkpoint.every=2", "checkpoint.keep=3", "steps=8", "ema.decay=0.9"),
    *("validation.samples=8", "parallel.timeout=30"),
)


@dataclass
class Ranks:
    """Processes of one start of a run."""

    processes: list[BaseProcess]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, limit: float = LIMIT) -> list[int | None]:
        """Their exit codes; negative for a signal."""
        deadline = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
                raise TimeoutError(f"a rank did not end within {limit:g} s")
        return [process.exitcode for process in self.processes]


def start(settings: Sequence[str], world_size: int, folder: Path) -> Ranks:
    """Start a run's ranks; `folder` is for the store of this start."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(list(settings), rank, world_size, folder), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Ranks(list(processes))


def _rank(settings: list[str], rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with open(folder / f"rank-{rank}.txt", "w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            store = dist.FileStore(str(folder / "store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
            run_to_end(built(configured(settings, world_size=world_size)), time.perf_counter())
            code = 0
        except BaseException as error:
            failure = explain(error)
            print(failure.traceback or failure.sentence, file=sys.stderr, flush=True)
            code = failure.code
        os._exit(code)  # a forked copy of the parent must not run its exit handlers


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> bool:
    """Whether it came to hold before all ranks had ended."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if condition():
            return True
        if not any(process.is_alive() for process in ranks.processes):
            return condition()
        time.sleep(0.001)
    raise TimeoutError(f"nothing happened within {LIMIT:g} s")


def final_bytes(run_dir: Path) -> dict[str, str]:
    """Hashes of the tensors' files of the newest checkpoint: equal exactly where every tensor is, bit for bit."""
    newest = checkpoint.complete(run_dir / "checkpoints")[-1]
    files = json.loads((Path(str(newest)) / "manifest.json").read_text())["files"]
    return {name: entry["xxh3"] for name, entry in files.items() if name.endswith(".safetensors")} | {"": newest.name}
