"""The checker: passes every legal schedule, objects to every broken one, and agrees with a second, naive reader."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.schedule.action import Action, Kind, Schedule, ScheduleError
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.check import check, violations
from tests.schedule.naive_reader import runs


def microbatches(name: str, pp: int) -> list[int]:
    if name in ("1f1b", "zb1p"):
        return sorted({1, 2, max(1, pp - 1), pp, pp + 1, 2 * pp, 2 * pp + 3})
    step = 2 if name == "dualpipe" else 1
    more = [3 * pp + (3 * pp) % step, 4 * pp + step] if pp <= 8 else []
    return [2 * pp, 2 * pp + step, 2 * pp + 2 * step, *more]


@pytest.mark.parametrize(
    ("name", "pp"), [(name, pp) for name in SCHEDULES for pp in range(1, 17) if name != "dualpipe" or pp % 2 == 0]
)
def test_every_legal_size_is_proven(name: str, pp: int) -> None:
    for n in microbatches(name, pp):
        check(build_schedule(name, pp, n))


@pytest.mark.parametrize(("name", "n"), [("1f1b", 120), ("zb1p", 120), ("dualpipe", 120), ("dualpipev", 120)])
def test_the_production_size_is_proven(name: str, n: int) -> None:
    check(build_schedule(name, 16, n))


small = st.sampled_from(
    [("1f1b", 1, 2), ("1f1b", 3, 5), ("zb1p", 2, 3), ("zb1p", 4, 6), ("dualpipe", 2, 4), ("dualpipe", 4, 10),
     ("dualpipev", 1, 3), ("dualpipev", 2, 5), ("dualpipev", 3, 6)]
)  # fmt: skip


@pytest.mark.parametrize("case", [("1f1b", 3, 5), ("zb1p", 4, 6), ("dualpipe", 4, 10), ("dualpipev", 3, 6)])
def test_the_naive_reader_accepts_what_is_right(case: tuple[str, int, int]) -> None:
    assert runs(build_schedule(*case))


def edited(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    return replace(schedule, actions=(*schedule.actions[:rank], tuple(actions), *schedule.actions[rank + 1 :]))


def pick(data: st.DataObject, schedule: Schedule) -> tuple[int, list[Action], int]:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    actions = list(schedule.actions[rank])
    return rank, actions, data.draw(st.integers(0, len(actions) - 1))


def objects(schedule: Schedule) -> None:
    found = violations(schedule)
    assert found and all("\n" not in sentence for sentence in found)
    with pytest.raises(ScheduleError):
        check(schedule)


@settings(max_examples=60, deadline=None)
@given(small, st.data())
def test_a_dropped_action_is_missed(case: tuple[str, int, int], data: st.DataObject) -> None:
    schedule = build_schedule(*case)
    rank, actions, at = pick(data, schedule)
    objects(edited(schedule, rank, actions[:at] + actions[at + 1 :]))


@settings(max_examples=60, deadline=None)
@given(small, st.data())
def test_a_repeated_action_is_noticed(case: tuple[str, int, int], data: st.DataObject) -> None:
    schedule = build_schedule(*case)
    rank, actions, at = pick(data, schedule)
    to = data.draw(st.integers(0, len(actions)))
    objects(edited(schedule, rank, [*actions[:to], actions[at], *actions[to:]]))


@settings(max_examples=80, deadline=None)
@given(small, st.data())
def test_a_changed_action_is_noticed(case: tuple[str, int, int], data: st.DataObject) -> None:
    schedule = build_schedule(*case)
    rank, actions, at = pick(data, schedule)
    old = actions[at]
    changes = [
        replace(old, microbatch=old.microbatch + data.draw(st.sampled_from([-1, 1, schedule.num_microbatches]))),
        replace(old, stage=old.stage + data.draw(st.sampled_from([-1, 1, schedule.num_stages]))),
    ]
    if old.kind.is_message:
        changes.append(replace(old, peer=data.draw(st.integers(0, schedule.num_ranks).filter(lambda p: p != old.peer))))
    else:
        changes.append(replace(old, direction=1 - old.direction))
    if old.paired is not None:
        changes += [
            replace(old, kind=Kind.F, paired=None),
            replace(old, paired=replace(old.paired, kind=Kind.B)),
            replace(old, paired=replace(old.paired, microbatch=old.paired.microbatch + 1)),
        ]
    actions[at] = data.draw(st.sampled_from(changes))
    objects(edited(schedule, rank, actions))


@settings(max_examples=250, deadline=None)
@given(small, st.data())
def test_swaps_are_judged_as_the_naive_reader_does(case: tuple[str, int, int], data: st.DataObject) -> None:
    """Two actions of one rank exchanged: mostly wrong, sometimes harmless (sends on two links); both readers agree."""
    schedule = build_schedule(*case)
    rank, actions, at = pick(data, schedule)
    reach = data.draw(st.sampled_from([1, 2, 3, len(actions)]))
    other = min(len(actions) - 1, at + data.draw(st.integers(1, reach)))
    actions[at], actions[other] = actions[other], actions[at]
    broken = edited(schedule, rank, actions)
    assert (violations(broken) == []) == runs(broken)


@settings(max_examples=80, deadline=None)
@given(small, st.data())
def test_actions_moved_to_another_rank_are_noticed(case: tuple[str, int, int], data: st.DataObject) -> None:
    schedule = build_schedule(*case)
    if schedule.num_ranks == 1:
        return
    rank, actions, at = pick(data, schedule)
    target = data.draw(st.integers(0, schedule.num_ranks - 1).filter(lambda r: r != rank))
    moved = edited(schedule, rank, actions[:at] + actions[at + 1 :])
    objects(edited(moved, target, [*moved.actions[target], actions[at]]))


def test_a_pair_is_a_forward_and_the_whole_backward_of_another() -> None:
    """Lists that do all the work in order, with a pair that is none."""
    base = build_schedule("dualpipev", 1, 2)
    (actions,) = base.actions
    at = next(i for i, action in enumerate(actions) if action.paired is not None)
    pair, back = actions[at], actions[at].paired
    assert back is not None
    split = [replace(pair, paired=replace(back, kind=Kind.B)), replace(back, kind=Kind.W)]
    beside = [back, replace(pair, kind=Kind.F)]
    for instead in (split, beside):
        (sentence,) = violations(replace(base, actions=((*actions[:at], *instead, *actions[at + 1 :]),)))
        assert sentence.startswith("rank 0 runs F1.1") and "pair" in sentence
    line = build_schedule("1f1b", 1, 1)
    own = Action(Kind.FB, 0, 0, 0, Action(Kind.BW, 0, 0))
    assert violations(replace(line, actions=((own,),))) == [
        "rank 0 runs F0.0&BW0.0: a forward can't overlap its own backward"
    ]


def test_work_on_a_rank_that_does_not_hold_the_stage() -> None:
    """Two replicas that share the micro-batches, where the placement knows one."""
    line = build_schedule("1f1b", 1, 2)
    (actions,) = line.actions
    found = violations(replace(line, actions=(actions[:2], actions[2:])))
    assert found == [f"rank 1 runs {kind} of stage 0, micro-batch 1, which rank 0 holds" for kind in "FBW"]


def test_a_message_sent_and_received_twice_is_noticed() -> None:
    schedule = build_schedule("zb1p", 2, 3)
    lists = [list(actions) for actions in schedule.actions]
    for actions, kind in zip(lists, (Kind.SEND_F, Kind.RECV_F), strict=True):
        at = next(i for i, action in enumerate(actions) if action.kind is kind)
        actions.insert(at, actions[at])
    found = violations(replace(schedule, actions=tuple(map(tuple, lists))))
    assert found == [
        "rank 0 has SEND_F0.0->rank 1 2 times, and its computations call for 1",
        "rank 1 has RECV_F1.0<-rank 0 2 times, and its computations call for 1",
    ]


def test_a_missing_message_is_named_at_the_rank_that_lacks_it() -> None:
    schedule = build_schedule("zb1p", 2, 3)
    first, second = schedule.actions
    without = tuple(action for action in first if action != Action(Kind.SEND_F, 0, 1, peer=1))
    assert violations(replace(schedule, actions=(without, second))) == [
        "rank 0 lacks SEND_F0.1->rank 1, which its computations call for"
    ]


def test_a_circle_of_waits_is_named() -> None:
    """Two ranks that each want the other's output first; every message has its other end."""
    schedule = build_schedule("dualpipe", 2, 4)
    lists = [list(actions) for actions in schedule.actions]
    for rank in (0, 1):
        firsts = [i for i, a in enumerate(lists[rank]) if a.kind is Kind.F and a.phase == 2]
        own, others = firsts[0], firsts[1]
        block = [a for a in lists[rank][own:others] if not a.kind.is_message or a.kind.is_send]
        receives = [a for a in lists[rank][: others + 1] if a.kind in (Kind.RECV_F, Kind.RECV_B)]
        lists[rank][: others + 1] = [*receives, lists[rank][others], *block]
    broken = replace(schedule, actions=tuple(map(tuple, lists)))
    assert not runs(broken)
    (sentence,) = violations(broken)
    assert "deadlocks: rank 0 at F1.2 waits for the activation for stage 1 of micro-batch 2; rank 1 at F1.0" in sentence


def test_a_rank_that_holds_too_much_is_named() -> None:
    """GPipe's order, all forwards first, does the work but holds every micro-batch: two may be held, three may not."""
    found = []
    for n in (2, 3):
        base = build_schedule("1f1b", 1, n)
        (actions,) = base.actions
        backwards_last = sorted(actions, key=lambda action: action.kind is not Kind.F)
        broken = replace(base, actions=(tuple(backwards_last),))
        found.append(violations(broken))
        assert runs(broken) == (n == 2)
    assert found == [[], ["rank 0 holds 3 stage-activations, more than 1 stages + 1"]]


def test_what_is_outside_the_schedule_is_said_with_its_sizes() -> None:
    schedule = build_schedule("1f1b", 2, 2)
    sizes = "there are 2 stages, 2 micro-batches and 2 ranks"
    first, second = schedule.actions
    for wrong, name in (
        (Action(Kind.SEND_F, 0, 0, peer=2), "SEND_F0.0->rank 2"), (Action(Kind.F, 2, 0), "F2.0"),
        (Action(Kind.F, 0, 2), "F0.2"), (Action(Kind.F, 0, 0, peer=1), "F0.0<-rank 1"),
    ):  # fmt: skip
        says = violations(replace(schedule, actions=((*first, wrong), second)))
        assert says == [f"rank 0 has {name} in direction {wrong.direction}: {sizes}"]


def test_an_action_that_runs_twice_is_one_violation_and_several_are_counted() -> None:
    schedule = build_schedule("1f1b", 1, 1)
    (actions,) = schedule.actions
    twice = replace(schedule, actions=((actions[0], *actions),))
    assert violations(twice) == ["F of stage 0, micro-batch 0 runs 2 times"]
    with pytest.raises(ScheduleError, match=r"^1f1b: F of stage 0, micro-batch 0 runs 2 times$"):
        check(twice)
    with pytest.raises(ScheduleError, match=r"^1f1b: F of stage 0, micro-batch 0 runs 0 times \(and 2 more\)$"):
        check(replace(schedule, actions=((),)))
    with pytest.raises(ScheduleError, match=r"runs 0 times \(and 1 more\)$"):
        check(replace(schedule, actions=(actions[:1],)))
