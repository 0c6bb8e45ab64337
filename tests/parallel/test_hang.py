"""Hang detector: every rank that waits names the missing rank, with group and collective, in bounded time."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch

from fp8moe.cli.command import explain
from fp8moe.errors import HangError
from fp8moe.parallel import hang, place
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh, warm_up
from tests.parallel.ranks import run_ranks, started

WORLD, LOST, TIMEOUT = 4, 2, 3.0
BOUND = TIMEOUT + 30.0


def sleep() -> None:
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def one_is_missing(kind: str, leave: Callable[[], None], left: Event) -> dict[str, Any]:
    """A round of dispatch and combine by all, then one without rank LOST; what this rank reports."""
    hang.HEARTBEAT = 0.25
    mesh = build_mesh(1, WORLD, WORLD, timeout=timedelta(seconds=TIMEOUT), ranks_per_node=2)
    hang.start()
    warm_up(mesh, torch.device("cpu"))
    dispatcher = make_dispatcher(kind, mesh, 8, max_tokens=4)
    rows, ids, weights = torch.ones(4, 16), torch.arange(8).view(4, 2), torch.ones(4, 2)
    arrived = dispatcher.dispatch(rows, dispatcher.announce(ids), weights).wait()
    dispatcher.combine(arrived.rows_RD, arrived.state).wait()
    if mesh.rank == LOST:
        left.set()
        leave()
    start = time.monotonic()
    first, second = (dispatcher.dispatch(rows, dispatcher.announce(ids), weights) for _ in range(2))
    with pytest.raises(HangError) as caught:
        first.wait()
    with pytest.raises(HangError):  # at once: nothing is sent after a message that failed
        second.wait()
    failure = explain(caught.value)
    return {"seconds": time.monotonic() - start, "text": str(caught.value), "code": failure.code,
            "secondary": failure.secondary}  # fmt: skip


CASES = [
    ("all_to_all", sleep, "is alive and stopped"),
    ("all_to_all", freeze, "has ended or is frozen"),
    ("all_to_all", die, "has ended or is frozen"),
    ("node_limited", die, "has ended or is frozen"),
]


@pytest.fixture(scope="module")
def of_cases() -> list[list[dict[str, Any]]]:
    """What the ranks of every case report. One case starts at a time, and all of them wait for lost ranks at once."""
    with ExitStack() as stack:
        results = []
        for kind, leave, _ in CASES:
            left = multiprocessing.get_context("fork").Event()
            case = started(one_is_missing, WORLD, kind, leave, left, timeout=BOUND + 60, absent=(LOST,))
            results.append(stack.enter_context(case))
            if not left.wait(60):
                results[-1]()  # says why
        return [result() for result in results]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{kind}-{leave.__name__}" for kind, leave, _ in CASES])
def test_the_missing_rank_is_named(of_cases: list[list[dict[str, Any]]], case: int) -> None:
    (_, leave, words), answers = CASES[case], of_cases[case]
    for rank, answer in enumerate(answers):
        if rank == LOST:
            continue
        assert answer["seconds"] < BOUND
        assert answer["code"] == 6
        assert f"rank {LOST} {words}" in answer["text"], answer["text"]
        assert "all_to_all (counts), number" in answer["text"] and "group ep0 (ranks 0-3)" in answer["text"]
        assert "rank 0" not in answer["text"] and "rank 3" not in answer["text"]
    # A killed rank's own end says more than the ranks that miss it; one that hangs reports nothing itself.
    secondary = [a["secondary"] for rank, a in enumerate(answers) if rank != LOST]
    assert all(secondary) if leave is die else not all(secondary)


def test_only_a_stopped_process_of_this_machine_is_ended() -> None:
    sleeper = ["sleep", "60"]
    stopped, alive, elsewhere, reused = (subprocess.Popen(sleeper) for _ in range(4))
    try:
        host = place.this_process()["host"]
        for process in (stopped, elsewhere, reused):
            process.send_signal(signal.SIGSTOP)
        silent = [{"host": host, "pid": p.pid, "started": place.process_state(p.pid)[1]} for p in (stopped, alive)]
        silent.append({"host": "another", "pid": elsewhere.pid, "started": place.process_state(elsewhere.pid)[1]})
        silent.append({"host": host, "pid": reused.pid, "started": "1"})
        silent.append({"host": host, "pid": 2**22 + 1, "started": "1"})  # no such process
        hang._current.append(hang._Detector(None, 0, None, silent=dict(enumerate(silent))))  # type: ignore[arg-type]
        time.sleep(0.1)
        hang.end_frozen()
        assert stopped.wait(5) == -signal.SIGKILL
        time.sleep(0.2)  # what was killed with it would be seen to be
        assert [p.poll() for p in (alive, elsewhere, reused)] == [None] * 3
    finally:
        hang._current.clear()
        for process in (stopped, alive, elsewhere, reused):
            process.kill()
            process.wait()


def slow() -> list[str]:
    """What is logged while a rank is late, though not too late."""
    hang.HEARTBEAT = 0.1
    mesh = build_mesh(1, 2, 1, timeout=timedelta(seconds=60))
    hang.start()
    hang.report_after(0.5)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fp8moe.parallel.hang").addHandler(handler)
    all_reduce(torch.ones(1), mesh.dp_group)
    if mesh.rank == 1:
        time.sleep(3)
    all_reduce(torch.ones(1), mesh.dp_group)
    return said


def test_a_late_rank_is_reported_once_before_the_timeout() -> None:
    waiting, late = run_ranks(slow, 2)
    (said,) = waiting
    assert "rank 0: rank 1 is alive and stopped after number 1 (all_reduce): all_reduce, number 2 of group dp0" in said
    assert "has not ended for" in said
    assert late == []


def undetected() -> str:
    mesh = build_mesh(1, 2, 1, timeout=timedelta(seconds=1))
    if mesh.rank == 1:
        time.sleep(60)
    with pytest.raises(RuntimeError) as caught:
        all_reduce(torch.ones(1), mesh.dp_group)
    assert not isinstance(caught.value, HangError)
    return str(caught.value)


def test_without_a_detector_the_error_is_the_back_ends() -> None:
    assert run_ranks(undetected, 2, absent=(1,))[0]
