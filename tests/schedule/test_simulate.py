"""The simulator: against the published formulas without rounding, a longest-path oracle, and DeepSeek's step."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from fp8moe.errors import ConfigError
from fp8moe.schedule.action import Kind, Schedule, ScheduleError
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, peak_held, published_bubble, simulate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", range(2, 17))
def test_bubbles_equal_the_published_formulas_exactly(name: str, pp: int) -> None:
    """F=1, B=2, W=1 and F&B of 2, 2.6 and 3, in fifths: whole numbers, so nothing rounds."""
    single = name in ("1f1b", "zb1p")
    if name == "dualpipe" and pp % 2:
        pp += 1
    least = pp if single else 2 * pp
    for n in [least, 2 * pp + 2, 4 * pp, 60] if pp < 6 else [least, 2 * pp + 2] if pp == 16 else [2 * pp + pp % 3 * 2]:
        schedule = build_schedule(name, pp, n)
        for pair in (13,) if single else (10, 13, 15):
            timeline = simulate(schedule, Costs(5, 10, 5, pair))
            stages = 2 * pp if name == "dualpipev" else pp
            expected = {
                "1f1b": (pp - 1) * (5 + 10),
                "zb1p": (pp - 1) * (5 + 10 - 2 * 5),
                "dualpipe": (stages // 2 - 1) * (pair + 10 - 3 * 5),
                "dualpipev": (stages // 2 - 1) * (pair + 10 - 3 * 5),
            }[name]
            assert max(timeline.bubble) == expected == published_bubble(name, stages, timeline.costs)
            assert {busy + bubble for busy, bubble in zip(timeline.busy, timeline.bubble, strict=True)} == {
                timeline.makespan
            }


def test_with_a_pair_that_gains_nothing_every_rank_waits_the_same() -> None:
    for name, pp, n in (("dualpipe", 8, 20), ("dualpipev", 5, 12), ("zb1p", 7, 9), ("1f1b", 4, 4)):
        assert len(set(simulate(build_schedule(name, pp, n), Costs(1, 2, 1)).bubble)) == 1


@pytest.mark.parametrize("costs", [Costs(10, 22, 8), Costs(10, 19, 9), Costs(10, 20, 7), Costs(3, 9, 3)])
def test_zb1p_keeps_its_formula_while_weights_cost_no_more_than_a_forward(costs: Costs) -> None:
    for pp in (2, 5, 8):
        timeline = simulate(build_schedule("zb1p", pp, 3 * pp), costs)
        assert max(timeline.bubble) == published_bubble("zb1p", pp, costs)
        assert timeline.makespan < simulate(build_schedule("1f1b", pp, 3 * pp), costs).makespan


@pytest.mark.parametrize("name", SCHEDULES)
def test_held_activations_per_rank(name: str) -> None:
    for pp in (2, 4, 8, 16):
        schedule = build_schedule(name, pp, 2 * pp + 4)
        peaks = simulate(schedule).peak_activations
        if name == "1f1b":
            assert peaks == tuple(pp - rank for rank in range(pp))
        elif name == "zb1p":
            assert peaks == (pp,) * pp
        else:
            assert peaks == (schedule.num_stages + 1,) * pp


def test_held_activations_weighed_by_stage() -> None:
    schedule = build_schedule("1f1b", 3, 5)
    assert peak_held(schedule, [100.0, 10.0, 1.0]) == (300.0, 20.0, 1.0)
    bidirectional = build_schedule("dualpipe", 4, 8)
    assert peak_held(bidirectional, [1.0] * 4) == peak_held(bidirectional)
    # Rank 0 holds stages 0 and 3; at its fullest a forward of stage 0 has just begun.
    only_last = peak_held(bidirectional, [0.0, 0.0, 0.0, 1.0])
    assert only_last[0] == only_last[3] and only_last[1] == only_last[2] == 0


def longest_paths(schedule: Schedule, costs: Costs) -> list[list[tuple[float, float]]]:
    """Start and end of every action by relaxing all constraints until nothing changes: no clocks, no order of events.

    A node is an action; edges say `starts no earlier than the other's end (or start, for messages)`.
    """
    nodes = [(rank, i) for rank, actions in enumerate(schedule.actions) for i in range(len(actions))]
    number = {node: k for k, node in enumerate(nodes)}
    acts = [schedule.actions[rank][i] for rank, i in nodes]
    made: dict[tuple[Kind, int, int], int] = {}
    for k, action in enumerate(acts):
        for kind, stage, mb, _ in action.parts():
            made[kind, stage, mb] = k
    message = np.array([action.kind.is_message for action in acts])
    took = np.array([float(costs.of(action)) for action in acts])
    links: dict[tuple[int, int], list[tuple[int, int]]] = {}
    posts: dict[tuple[int | None, Kind, int, int], int] = {}
    for k, action in enumerate(acts):
        if action.kind.is_message and not action.kind.is_send:
            posts[nodes[k][0], action.kind, action.stage, action.microbatch] = k
    for k, action in enumerate(acts):
        if action.kind.is_send:
            links.setdefault((nodes[k][0], action.peer or 0), []).append((k, posts[action.peer, *action.message]))
    start = np.zeros(len(nodes))
    arrive = np.zeros(len(nodes))
    changed = True
    while changed:
        before = start.copy(), arrive.copy()
        for k, (rank, i) in enumerate(nodes):
            if i:
                previous = number[rank, i - 1]
                start[k] = max(start[k], start[previous] + (0 if message[previous] else took[previous]))
            for kind, stage, mb, direction in acts[k].parts():
                step = {Kind.F: -1, Kind.B: 1}.get(kind)
                if step is None or not 0 <= stage + step < schedule.num_stages:
                    continue
                if schedule.placement[direction][stage + step] == rank:
                    source = made[kind, stage + step, mb]
                    start[k] = max(start[k], start[source] + took[source])
                else:
                    wanted = Kind.RECV_F if kind is Kind.F else Kind.RECV_B
                    start[k] = max(start[k], arrive[posts[rank, wanted, stage, mb]])
        for pairs in links.values():
            free = 0.0
            for send, post in pairs:
                free = max(free, start[send], start[post]) + costs.message
                arrive[send] = arrive[post] = max(arrive[post], free)
        changed = not (np.array_equal(before[0], start) and np.array_equal(before[1], arrive))
    ends = np.where(message, arrive, start + took)
    return [
        [(float(start[number[rank, i]]), float(ends[number[rank, i]])) for i in range(len(actions))]
        for rank, actions in enumerate(schedule.actions)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(4))
def test_times_equal_longest_paths(name: str, seed: int) -> None:
    draw = random.Random(seed)
    pp = draw.choice([2, 4]) if name == "dualpipe" else draw.choice([1, 2, 3])
    schedule = build_schedule(name, pp, 2 * pp + 2 * draw.randint(0, 2))
    forward, backward = draw.randint(1, 9), draw.randint(2, 9)
    costs = Costs(
        forward, backward, draw.randint(0, backward), max(forward, backward) + draw.randint(0, 5), draw.randint(0, 4),
        tuple(draw.choice([0.5, 1.0, 2.0]) for _ in range(schedule.num_stages)),
    )  # fmt: skip
    timeline = simulate(schedule, costs)
    assert [[(t.start, t.end) for t in rank] for rank in timeline.ranks] == longest_paths(schedule, costs)
    assert timeline.makespan == max(t.end for rank in timeline.ranks for t in rank if not t.action.kind.is_message)


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_and_uneven_stages_only_lengthen(name: str) -> None:
    schedule = build_schedule(name, 8, 32)
    spans = [simulate(schedule, Costs(1, 2, 1, 2.6, message)).makespan for message in (0, 0.05, 0.2, 1)]
    assert spans == sorted(spans) and spans[0] < spans[-1]
    heavy = [1.0] * schedule.num_stages
    heavy[1] = 1.5
    assert simulate(schedule, Costs(1, 2, 1, 2.6, 0, tuple(heavy))).makespan > spans[0]


def test_a_pair_of_unequal_stages_gains_what_the_smaller_can_hide() -> None:
    schedule = build_schedule("dualpipe", 2, 4)
    pair = next(action for action in schedule.actions[0] if action.kind is Kind.FB)
    assert pair.paired is not None and (pair.stage, pair.paired.stage) == (1, 0)
    assert Costs(1, 2, 1, 2.6, 0, (1.0, 1.0)).of(pair) == pytest.approx(2.6)
    assert Costs(1, 2, 1, 2.6, 0, (3.0, 0.5)).of(pair) == pytest.approx(0.5 + 6 - 0.2)
    assert Costs(1, 2, 1).of(pair) == 3


def test_sixteen_ranks_and_120_micro_batches_answer_at_once() -> None:
    begin = time.process_time()
    simulate(build_schedule("dualpipe", 16, 120), Costs(1, 2, 1, 2.6, 0.05))
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        ({"forward": -1}, "F=-1 must be a finite number of at least 0: use F=0"),
        ({"backward": float("inf")}, "B=inf must be a finite number"),
        ({"weight": float("nan")}, "W=nan must be a finite number"),
        ({"message": -0.5}, "message=-0.5 must be a finite number"),
        ({"backward": 1, "weight": 2}, "W=2 is more than B=1"),
        ({"overlapped": 1.5}, "FB=1.5 must be a finite number of at least 2"),
        ({"overlapped": float("nan")}, "FB=nan must be a finite number"),
    ],
)
def test_impossible_costs(costs: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Costs(**costs)  # type: ignore[arg-type]


def test_costs_of_another_number_of_stages() -> None:
    with pytest.raises(ConfigError, match=r"costs\.stages has 3 shares and the schedule 4 stages: use 4"):
        simulate(build_schedule("1f1b", 4, 4), Costs(stages=(1.0, 1.0, 1.0)))


def test_a_link_that_receives_in_another_order_is_refused() -> None:
    schedule = build_schedule("1f1b", 2, 4)
    actions = list(schedule.actions[1])
    receives = [i for i, action in enumerate(actions) if action.kind is Kind.RECV_F]
    actions[receives[0]], actions[receives[1]] = actions[receives[1]], actions[receives[0]]
    with pytest.raises(ScheduleError, match="message 0 on link 0 -> 1 is sent as the activation for stage 1 of micro-"):
        simulate(replace(schedule, actions=(schedule.actions[0], tuple(actions))))


def test_costs_at_their_limits() -> None:
    Costs(forward=0, backward=0, weight=0, message=0)
    Costs(1, 2, 2, 2)  # W is all of B, and FB no longer than B
    costs = Costs(1, 2, 0.5, 2.5, 0.25, (1.0, 2.0))
    assert costs.scaled(4) == Costs(4, 8, 2, 10, 0.25, (1.0, 2.0)) and costs.pair == 2.5
    assert Costs(1, 2, 0.5).scaled(4).overlapped is None and Costs(1, 2, 0.5).pair == 3


def test_time_by_kind_leaves_messages_out() -> None:
    timeline = simulate(build_schedule("zb1p", 2, 2), Costs(1, 3, 1, message=0.5))
    assert timeline.time_by_kind(0) == {Kind.F: 2, Kind.B: 4, Kind.W: 2}
