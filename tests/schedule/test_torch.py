"""torch's own schedules as the oracle: their action tables, read into ours, timed by the same simulator."""

from unittest import mock

import pytest
from torch.distributed.pipelining import PipelineStage, schedules

from fp8moe.schedule.action import Action, Kind, Schedule, with_messages
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.check import check
from fp8moe.schedule.simulate import Costs, simulate

KINDS = {"F": Kind.F, "I": Kind.B, "W": Kind.W, "B": Kind.BW}


def torch_schedule(name: str, ranks: int, n: int) -> Schedule:
    """The table of torch's class `name`, two stages a rank in a V; nothing of it runs, so its stages are stand-ins."""
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, ranks, 2 * ranks, None
    table = getattr(schedules, name)([stage, stage], n).pipeline_order

    def ours(action: schedules._Action) -> Action:
        if action.sub_actions is not None:
            forward, backward = (ours(part) for part in action.sub_actions)
            return Action(Kind.FB, forward.stage, forward.microbatch, 0, backward)
        assert action.microbatch_index is not None
        return Action(KINDS[action.computation_type.value], action.stage_index, action.microbatch_index)

    lists = tuple(tuple(ours(action) for action in table[rank] if action is not None) for rank in range(ranks))
    up = tuple(range(ranks))
    return with_messages(Schedule(name, n, lists, ((*up, *reversed(up)),)))


COSTS = (
    Costs(1, 2, 1, 2.6),
    Costs(1, 2.2, 0.7, 3.2, 0.1),
    Costs(0.049, 0.107, 0.032, 0.144, 0.0012),
)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_no_more_time_and_no_more_memory_than_torch(ranks: int) -> None:
    for n in (2 * ranks, 2 * ranks + 1, 24):
        theirs = torch_schedule("ScheduleDualPipeV", ranks, n)
        ours = build_schedule("dualpipev", ranks, n)
        check(theirs)
        for costs in COSTS:
            a, b = simulate(ours, costs), simulate(theirs, costs)
            assert a.makespan <= b.makespan * (1 + 1e-12)
            assert all(x <= y for x, y in zip(a.peak_activations, b.peak_activations, strict=True))


def test_side_by_side() -> None:
    """Printed with `pytest -s`; ZBV has no pairs, so it gains nothing from an overlap."""
    print("\n24 micro-batches, F=1 B=2 W=1 F&B=2.6: makespan / bubble / held (of 2 x ranks + 1)")
    print("ranks  ours                 torch DualPipeV      torch ZBV")
    for ranks in range(2, 9):
        row = []
        for schedule in (
            build_schedule("dualpipev", ranks, 24),
            torch_schedule("ScheduleDualPipeV", ranks, 24),
            torch_schedule("ScheduleZBVZeroBubble", ranks, 24),
        ):
            check(schedule)
            timeline = simulate(schedule, Costs(1, 2, 1, 2.6))
            row.append((timeline.makespan, max(timeline.bubble), max(timeline.peak_activations)))
        print(f"{ranks:<7}" + "  ".join(f"{span:6.1f} / {bubble:4.1f} / {held:2}" for span, bubble, held in row))
        assert row[0] <= row[1] and row[0][0] < row[2][0]
