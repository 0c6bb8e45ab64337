"""Replays against the simulator, whose order of events they walk."""

import random

import pytest

from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.replay import Replay
from fp8moe.schedule.simulate import Costs, simulate

SCHEDULES = [("1f1b", 1, 3), ("1f1b", 4, 9), ("zb1p", 4, 8), ("dualpipe", 4, 10), ("dualpipev", 3, 7)]


@pytest.mark.parametrize(("name", "ranks", "count"), SCHEDULES)
def test_a_replay_gives_the_simulators_times(name, ranks, count):
    schedule, random_ = build_schedule(name, ranks, count), random.Random(0)
    replay = Replay(schedule)
    for message in (0.0, 0.3, 4.0):
        forward, weight = 1 + random_.random(), random_.random()
        backward = 1 + weight + random_.random()
        stages = tuple(0.5 + random_.random() for _ in range(schedule.num_stages))
        costs = Costs(forward, backward, weight, max(forward, backward) + 0.1, message, stages)
        timeline = simulate(schedule, costs)
        assert replay.makespan(costs.of, message) == pytest.approx(timeline.makespan, rel=1e-12)
        assert replay.busy(costs.of) == pytest.approx(list(timeline.busy), rel=1e-12)
