"""Preemption with real processes: any rank, any moment, one step on all ranks, exit code 75; and killed ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.train import preempt
from fp8moe.train.checkpoint import complete
from fp8moe.train.checkpoint.files import LocalFolder
from fp8moe.train.checkpoint.state import read_state
from tests.train.runs import SMALL, configured

PREEMPTED = 75


def _rank(rank: int, world_size: int, port: int, words: list[str], change: Callable[[], None] | None) -> None:
    """One process of a run as a launcher starts it; `change` plants what the test needs."""
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if change is not None:
        change()
    os._exit(main(["train", *words]))


class Job:
    """Forked ranks of one run."""

    def __init__(self, words: list[str], run_dir: Path, world_size: int, change: Callable[[], None] | None = None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.run_dir = run_dir
        words = [*SMALL, *words, f"run_dir={run_dir}", "resume=auto"]
        context = multiprocessing.get_context("fork")
        self.ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, world_size, port, words, change)) for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline and all(process.is_alive() for process in self.ranks)
            time.sleep(0.01)

    def send(self, rank: int, number: int) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, seconds: float = 60.0) -> list[int | None]:
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


@pytest.fixture
def start(corpus: list[str], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def started(*words: str, world_size: int = 2, change: Callable[[], None] | None = None, name: str = "run") -> Job:
        jobs.append(Job([*corpus, *words], tmp_path / name, world_size, change))
        return jobs[-1]

    yield started
    for job in jobs:
        job.kill()


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def saved(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in complete(run_dir / "checkpoints")), default=0)


def test_signals_at_random_moments_lose_no_step(start: Callable[..., Job], tmp_path: Path) -> None:
    """One run, preempted five times, one of two ranks at a time; each start goes on where the last one stopped."""
    generator = random.Random(1)
    run_dir, reached = tmp_path / "run", 0
    for _ in range(5):
        job = start("steps=100000", "validation.every=3", "checkpoint.every=2", "precision=bf16")
        job.wait_for(lambda reached=reached: bool(steps(run_dir)) and steps(run_dir)[-1] > reached)  # type: ignore[misc]
        time.sleep(generator.uniform(0.0, 0.4))
        job.send(generator.randrange(2), generator.choice([signal.SIGTERM, signal.SIGUSR1]))
        begin = time.monotonic()
        assert job.codes() == [PREEMPTED, PREEMPTED] and time.monotonic() - begin < 25
        assert saved(run_dir) == steps(run_dir)[-1] > reached
        assert steps(run_dir) == list(range(1, saved(run_dir) + 1))
        assert f"step {saved(run_dir)} is saved" in (run_dir / "preempted").read_text()
        assert not (run_dir / "lock").exists()
        reached = saved(run_dir)


def _slow_step() -> None:
    """Rank 1 stays in the forward pass of step 3 for good, as in a compiler; a step may take half a second longer."""
    from fp8moe.train import loop, step

    preempt.GRACE = 0.5
    forward_backward, done = step.forward_backward, loop.train_step

    def never(run: object, *arguments: object, **options: object) -> object:
        if run.step == 2 and run.mesh.rank == run.mesh.world_size - 1:  # type: ignore[attr-defined]
            (run.run_dir / "stuck").touch()  # type: ignore[attr-defined]
            time.sleep(1000)
        return forward_backward(run, *arguments, **options)  # type: ignore[arg-type]

    assert done is step.train_step
    step.forward_backward = never  # type: ignore[assignment]


@pytest.mark.parametrize(("world_size", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_step_that_takes_too_long_is_abandoned(
    world_size: int, number: int, start: Callable[..., Job], tmp_path: Path
) -> None:
    """What is saved is the state before it: numbers included, that the step has changed already."""
    job = start("steps=100000", world_size=world_size, change=_slow_step)
    run_dir = tmp_path / "run"
    job.wait_for((run_dir / "stuck").exists)
    job.send(0, number)
    assert job.codes(25.0) == [PREEMPTED] * world_size
    assert saved(run_dir) == 2 and steps(run_dir) == [1, 2]
    config = configured([], "precision=fp8")
    state = read_state(
        run_dir / "checkpoints" / "step-2", config.model, seed=config.seed, seq_len=32, optimizer=config.optimizer.kind
    )
    assert (state.step, state.updates, state.consumed) == (2, 2, 16)


def _waits_in(place: str) -> None:
    """Rank 1 waits for good while the run is built, for data of step 3, or in the validation after step 2."""
    from fp8moe.train import loop, step

    preempt.GRACE = 0.5
    module, name = {"build": (loop, "build"), "data": (step, "next_batches"), "validation": (loop, "_validate")}[place]
    original = getattr(module, name)

    def waits(*arguments: object) -> object:
        if place == "build":
            (_, mesh, _, run_dir, *_), is_here = arguments, True
        else:
            (run,) = arguments
            mesh, run_dir, is_here = run.mesh, run.run_dir, run.step == 2  # type: ignore[attr-defined]
        if is_here and mesh.rank == 1:  # type: ignore[attr-defined]
            (run_dir / "stuck").touch()  # type: ignore[operator]
            time.sleep(1000)
        return original(*arguments)

    setattr(module, name, waits)


@pytest.mark.parametrize("place", ["build", "data", "validation"])
def test_a_wait_wherever_it_is_does_not_keep_a_signal_off(
    place: str, start: Callable[..., Job], tmp_path: Path
) -> None:
    """Both ranks save the step before the wait, or nothing where there is none, and end."""
    job = start("steps=100000", "validation.every=2", change=partial(_waits_in, place))
    run_dir = tmp_path / "run"
    job.wait_for((run_dir / "stuck").exists)
    job.send(0, signal.SIGTERM)
    assert job.codes(25.0) == [PREEMPTED] * 2
    assert saved(run_dir) == (0 if place == "build" else 2) and not (run_dir / "lock").exists()
    said = "nothing to save" if place == "build" else "step 2 is saved"
    assert said in (run_dir / "preempted").read_text()


def _read_hangs() -> None:
    """The thread that reads ahead hangs at the samples of step 3, as on a file server that is gone."""
    from fp8moe.train import reading

    preempt.GRACE = 0.5
    original = reading.microbatches_of

    def hangs(ids: list[int], size: int) -> object:
        if ids[0] >= 16:
            time.sleep(1000)
        return original(ids, size)

    reading.microbatches_of = hangs  # type: ignore[assignment]


def test_a_read_that_hangs_does_not_keep_a_signal_off(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start("steps=100000", world_size=1, change=_read_hangs)
    job.wait_for(lambda: steps(tmp_path / "run")[-1:] == [2])
    job.send(0, signal.SIGTERM)
    assert job.codes(25.0) == [PREEMPTED]
    assert saved(tmp_path / "run") == 2


def test_a_second_interrupt_ends_at_once(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start("steps=100000", world_size=1, change=_slow_step_long)
    job.wait_for((tmp_path / "run" / "stuck").exists)
    job.send(0, signal.SIGINT)
    time.sleep(preempt.REPEATED + 0.5)
    begin = time.monotonic()
    job.send(0, signal.SIGINT)
    assert job.codes() == [130] and time.monotonic() - begin < 2
    assert saved(tmp_path / "run") == 0


def _slow_step_long() -> None:
    _slow_step()
    preempt.GRACE = 100.0


def _dies_once_published() -> None:
    """Rank 0 is killed as soon as the checkpoint of a step has its name."""
    publish = LocalFolder.publish

    def dies(self: LocalFolder, written: LocalFolder) -> None:
        publish(self, written)
        os.kill(os.getpid(), signal.SIGKILL)

    LocalFolder.publish = dies  # type: ignore[method-assign]


def test_a_checkpoint_has_its_line(start: Callable[..., Job], tmp_path: Path) -> None:
    """Killed as a checkpoint appears: its step is in metrics.jsonl, and the next start has every step once."""
    run_dir = tmp_path / "run"
    for background in ("true", "false"):
        before = saved(run_dir)
        job = start("steps=12", "checkpoint.every=2", f"checkpoint.background={background}", world_size=1,
                    change=_dies_once_published)  # fmt: skip
        assert job.codes() == [-signal.SIGKILL]
        assert saved(run_dir) == before + 2 and saved(run_dir) in steps(run_dir)
    job = start("steps=6", world_size=1)
    assert job.codes() == [0] and steps(run_dir) == [1, 2, 3, 4, 5, 6]


def test_one_process_listens_to_nobody_and_keeps_its_directory(
    start: Callable[..., Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = start("steps=100000", world_size=1)
    job.wait_for(lambda: bool(steps(tmp_path / "run")))
    pid = job.ranks[0].pid
    assert pid is not None and listening(pid) == []
    other = start("steps=100000", world_size=1)
    assert other.codes() == [2]
    assert f"belongs to a run that is alive: process {pid} on {os.uname().nodename}" in capfd.readouterr().err
    job.kill()
    again = start("steps=2", "logging.every=1", world_size=1)
    assert again.codes() == [0] and "has ended: the lock is taken over" in capfd.readouterr().out


def listening(pid: int) -> list[str]:
    """Addresses, as /proc shows them, on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1])
    return found
