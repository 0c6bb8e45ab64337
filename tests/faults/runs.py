"""Real processes of `fp8moe train` on a small run, forked from this warm one; their ends can be compared bit by bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fp8moe.__main__ import main
from fp8moe.train import checkpoint
from fp8moe.train.signals import SIGNALS
from tests.train.runs import SMALL

LIMIT = 120.0  # seconds that anything here may take
SETTINGS = (
    *SMALL,
    *("precision=fp8", "batch.micro_batch=2", "checkpoint.every=2", "checkpoint.keep=3", "steps=8", "ema.decay=0.9"),
    *("validation.samples=8", "parallel.timeout=30", "resume=auto"),
)


@dataclass
class Ranks:
    """Processes of one start of a run; folder: what they printed."""

    processes: list[BaseProcess]
    folder: Path

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, limit: float = LIMIT) -> list[int | None]:
        """Their exit codes; negative for a signal."""
        deadline = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise TimeoutError(f"a rank did not end within {limit:g} s")
        return [process.exitcode for process in self.processes]

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def said(self, rank: int = 0) -> str:
        """All that a rank printed."""
        return (self.folder / f"rank-{rank}.txt").read_text(errors="replace")

    def sentence(self, rank: int = 0) -> str:
        """The last line that a rank printed; "" of none."""
        return next((line for line in reversed(self.said(rank).splitlines()) if line.strip()), "")


def start(settings: Sequence[str], world_size: int, folder: Path, change: Callable[[int], None] | None = None) -> Ranks:
    """Start a run's ranks with `settings` over SETTINGS. change(rank) plants what a trial needs, in the rank."""
    words = ["train", *SETTINGS, *settings]
    return forked(words, world_size, folder, change)


def forked(words: Sequence[str], world_size: int, folder: Path, change: Callable[[int], None] | None = None) -> Ranks:
    """`fp8moe WORDS` in `world_size` processes as a launcher starts them; of one, as a single process."""
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(list(words), rank, world_size, port, folder, change))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Ranks(list(processes), folder)


def _rank(
    words: list[str], rank: int, world_size: int, port: int, folder: Path, change: Callable[[int], None] | None
) -> None:
    torch.set_num_threads(1)
    with open(folder / f"rank-{rank}.txt", "w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = said, said
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if world_size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        if change is not None:
            change(rank)
        code = main(words)
        said.flush()
        os._exit(code)  # a forked copy of the parent must not run its exit handlers


def wait_until(condition: Callable[[], bool], ranks: Ranks, limit: float = LIMIT) -> bool:
    """Whether it came to hold before all ranks had ended."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        if not ranks.alive:
            return condition()
        time.sleep(0.001)
    ranks.kill()
    raise TimeoutError(f"nothing happened within {limit:g} s")


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = checkpoint.complete(run_dir / "checkpoints")
    return Path(str(whole[-1])) if whole else None


def steps(run_dir: Path) -> list[int]:
    """Steps that have a line in metrics.jsonl, in its order; the last line may be half-written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def final_bytes(run_dir: Path) -> dict[str, str]:
    """Hashes of the tensors' files of the newest checkpoint: equal exactly where every tensor is, bit for bit."""
    path = newest(run_dir)
    assert path is not None
    files = json.loads((path / "manifest.json").read_text())["files"]
    return {name: entry["xxh3"] for name, entry in files.items() if name.endswith(".safetensors")} | {"": path.name}


@dataclass(frozen=True)
class Undisturbed:
    """A run without faults: its directory, the hashes of its end, and how long it took."""

    run_dir: Path
    bytes: dict[str, str]
    seconds: float


_undisturbed: dict[tuple[str, ...], Undisturbed] = {}


def undisturbed(corpus: list[str], world_size: int, folder: Path, *more: str, limit: float = LIMIT) -> Undisturbed:
    """The run of the same settings without faults; made once beside the folders of the trials."""
    key = (str(folder.parent), str(world_size), *more)
    if key not in _undisturbed:
        name, begun = f"undisturbed-{len(_undisturbed)}", time.monotonic()
        run_dir = folder.parent / name
        ranks = start([*corpus, *more, f"run_dir={run_dir}"], world_size, folder.parent / f"{name}-start")
        codes = ranks.wait(limit)
        assert codes == [0] * world_size, (codes, ranks.said())
        _undisturbed[key] = Undisturbed(run_dir, final_bytes(run_dir), time.monotonic() - begun)
    return _undisturbed[key]


def went_on(settings: Sequence[str], world_size: int, folder: Path, run_dir: Path, expected: Undisturbed) -> str | None:
    """Start the run again and compare its end with that of the undisturbed one -> what was lost."""
    ranks = start([*settings, f"run_dir={run_dir}"], world_size, folder)
    codes = ranks.wait()
    if codes != [0] * world_size:
        return f"the run did not go on: exit codes {codes}: {ranks.sentence()}"
    return end_differs(run_dir, expected)


def end_differs(run_dir: Path, expected: Undisturbed) -> str | None:
    """How a run that has ended differs from the undisturbed one: in its steps or in a bit of its last checkpoint."""
    wanted = steps(expected.run_dir)
    if steps(run_dir) != wanted:
        return f"metrics.jsonl has the steps {steps(run_dir)}"
    return None if final_bytes(run_dir) == expected.bytes else "another end than the undisturbed run's"
