"""What a schedule keeps at once: against published counts, and against sets of tensors that come and go."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.plan.held import StageBytes, most_held, most_messages, pair_excess
from fp8moe.schedule.action import Kind, Schedule
from fp8moe.schedule.build import build_schedule, num_stages

ONE = StageBytes((1.0,), 1.0)
SCHEDULES = [("1f1b", 4), ("zb1p", 4), ("dualpipe", 4), ("dualpipe", 8), ("dualpipev", 4), ("dualpipev", 1)]


def stages(name: str, pp: int) -> list[StageBytes]:
    """Of different sizes, so that a stage mistaken for another is seen."""
    return [StageBytes((1.0 + i, 2.0, 3.0 + i / 3), 4.0 + i / 7) for i in range(num_stages(name, pp))]


def test_published_counts() -> None:
    """Micro-batches: pp for 1f1b's first rank and all of zb1p's; pp + 1 in DualPipe (DeepSeek-V3 report, table 2)."""
    of_1f1b = [most_held(build_schedule("1f1b", 8, 32), rank, [ONE] * 8) for rank in range(8)]
    assert of_1f1b == [(8 - rank, 0) for rank in range(8)]
    assert [most_held(build_schedule("zb1p", 8, 32), rank, [ONE] * 8)[0] for rank in range(8)] == [8] * 8
    for pp in (4, 8, 16):
        schedule = build_schedule("dualpipe", pp, 4 * pp)
        assert {max(most_held(schedule, rank, [ONE] * pp)) for rank in range(pp)} == {pp + 1}


def by_sets(schedule: Schedule, rank: int, sizes: list[StageBytes], *, overlap: bool) -> float:
    """The same most, from the passes and waiting gradients that exist, one by one."""
    alive: dict[tuple[int, int, int], float] = {}
    waiting: dict[tuple[int, int], float] = {}
    most = 0.0

    def note() -> None:
        nonlocal most
        most = max(most, sum(alive.values()) + sum(waiting.values()))

    def forward(stage: int, microbatch: int, position: int) -> None:
        alive[stage, microbatch, position] = sizes[stage].passes[position]
        note()

    for action in schedule.actions[rank]:
        if action.paired is not None:
            back = action.paired
            ahead, behind = len(sizes[action.stage].passes), len(sizes[back.stage].passes)
            if not overlap:
                for position in range(ahead):
                    forward(action.stage, action.microbatch, position)
            for position, other in zip_longest(range(ahead), reversed(range(behind))):
                if position is not None and overlap:
                    forward(action.stage, action.microbatch, position)
                if other is not None:
                    del alive[back.stage, back.microbatch, other]
            continue
        for kind, stage, microbatch, _ in action.parts():
            if kind is Kind.F:
                for position in range(len(sizes[stage].passes)):
                    forward(stage, microbatch, position)
            elif kind is Kind.B:
                for position in range(len(sizes[stage].passes)):
                    del alive[stage, microbatch, position]
                waiting[stage, microbatch] = sizes[stage].deferred
            else:
                del waiting[stage, microbatch]
        note()
    assert not alive and not waiting
    return most


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("name", "pp"), SCHEDULES)
def test_the_most_is_that_of_what_exists(name: str, pp: int, overlap: bool) -> None:
    schedule, sizes = build_schedule(name, pp, 6 * pp), stages(name, pp)
    for rank in range(pp):
        alone, in_pair = most_held(schedule, rank, sizes, overlap=overlap)
        assert max(alone, in_pair) == pytest.approx(by_sets(schedule, rank, sizes, overlap=overlap))
        assert overlap or in_pair == 0


@pytest.mark.parametrize(("name", "pp"), SCHEDULES)
def test_few_micro_batches_hold_what_many_do(name: str, pp: int) -> None:
    """Twice as many as pipeline ranks: `plan.memory.schedule_of` builds no more."""
    few, many, sizes = build_schedule(name, pp, 2 * max(pp, 1)), build_schedule(name, pp, 8 * pp), stages(name, pp)
    for rank in range(pp):
        assert most_held(few, rank, sizes) == most_held(many, rank, sizes)
        assert most_messages(few, rank) == most_messages(many, rank)


BYTES = st.lists(st.floats(0, 100), min_size=1, max_size=6)


@settings(deadline=None)
@given(BYTES, BYTES)
def test_a_pair_is_between_nothing_and_a_whole_stage(ahead: list[float], back: list[float]) -> None:
    excess = pair_excess(ahead, back)
    assert max(ahead[0], sum(ahead) - sum(back)) - 1e-6 <= excess <= sum(ahead) + 1e-6


@pytest.mark.parametrize(("name", "pp"), SCHEDULES)
def test_messages_at_once(name: str, pp: int) -> None:
    """A rank sends to each neighbour, and a receive stands one computation before the one that needs it."""
    schedule = build_schedule(name, pp, 4 * pp)
    for rank in range(pp):
        neighbours = {action.peer for action in schedule.actions[rank] if action.peer is not None}
        links = len({(action.kind, action.peer) for action in schedule.actions[rank] if action.kind.is_message})
        most = most_messages(schedule, rank)
        assert 2 * len(neighbours) <= most <= len(neighbours) + links, (rank, most)
    assert most_messages(build_schedule("1f1b", 4, 8), 3) == 2
