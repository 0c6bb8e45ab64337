"""A rank that stops in the middle of a schedule ends all others in bounded time, and is the one they name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.synchronize import Event

import pytest
import torch.distributed as dist

from fp8moe.errors import HangError
from fp8moe.parallel import hang
from fp8moe.profile.spans import Stopwatch, listening
from fp8moe.train.step import forward_backward, next_batches
from tests.parallel.ranks import started
from tests.train.runs import built, configured

PP, LOST, TIMEOUT = 4, 2, 4.0


class Leaver:
    """Hears of every action, and leaves at one."""

    def __init__(self, action: str, leave: Callable[[], None], left: Event) -> None:
        self._action, self._leave, self._left = action, leave, left

    def began(self, name: str) -> None:
        if name.split("&")[0] == self._action:
            self._left.set()
            self._leave()

    def ended(self, name: str, began: None) -> None: ...


def sleep() -> None:
    time.sleep(120)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_leaves(settings: list[str], action: str, leave: Callable[[], None], left: Event) -> tuple[float, str]:
    """How long this rank waited, and what it was told."""
    hang.HEARTBEAT = 0.25
    run = built(configured(settings, world_size=PP))
    hang.start()
    run.links.timeout = timedelta(seconds=TIMEOUT)
    batches, counts = next_batches(run)
    start = time.monotonic()
    with listening(Leaver(action, leave, left)), pytest.raises(HangError) as caught:
        forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    seconds = time.monotonic() - start
    wait_for_others()
    return seconds, str(caught.value)


def wait_for_others() -> None:
    """Stay until all others have been told, or for 30 s: a rank that has gone is named beside the one that was lost."""
    store = dist.distributed_c10d._get_default_store()
    store.add("told", 1)
    until = time.monotonic() + 30
    while store.add("told", 0) < PP - 1 and time.monotonic() < until:
        time.sleep(0.05)


CASES = [
    ("1f1b", "F2.3", die, "has ended or is frozen"),
    ("1f1b", "BW2.1", sleep, "is alive and stopped after number"),
    ("dualpipe", "F2.1", die, "has ended or is frozen"),
    ("dualpipe", "F1.5", sleep, "is alive and stopped after number"),
]


@pytest.fixture(scope="module")
def answers(corpus: list[str]) -> list[list[tuple[float, str]]]:
    """What the ranks of every case say. One case computes at a time, and all of them wait for lost ranks at once."""
    with ExitStack() as stack:
        results = []
        for schedule, action, leave, _ in CASES:
            settings = [*corpus, f"parallel.schedule={schedule}", f"parallel.pp={PP}", "model.num_layers=4",
                        "batch.micro_batch=1", "precision=bf16"]  # fmt: skip
            left = multiprocessing.get_context("fork").Event()
            case = started(one_leaves, PP, settings, action, leave, left, absent=(LOST,))
            results.append(stack.enter_context(case))
            if not left.wait(60):
                results[-1]()  # says why
        return [result() for result in results]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case[:2])) for case in CASES])
def test_the_rank_that_stops_is_named(answers: list[list[tuple[float, str]]], case: int) -> None:
    words = CASES[case][3]
    for rank, answer in enumerate(answers[case]):
        if rank != LOST:
            seconds, said = answer
            assert seconds < TIMEOUT + 30
            assert f"rank {LOST} {words}" in said, said
            named = [f"rank {other} {state}" for other in range(PP) for state in ("is alive", "has ended")]
            assert [name for name in named if name in said and not name.startswith(f"rank {LOST}")] == [], said
