"""The lists themselves: against tables written by hand, against the papers' symmetries, and what sizes are refused."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from fp8moe.errors import ConfigError
from fp8moe.schedule.action import Action, Kind, Schedule
from fp8moe.schedule.build import SCHEDULES, build_schedule, forwards, num_stages
from fp8moe.schedule.dualpipe import PHASES, dualpipe, dualpipev


def written(actions: tuple[Action, ...]) -> str:
    """`F0.3`: kind, stage, micro-batch; messages left out."""
    return " ".join(str(action) for action in actions if not action.kind.is_message)


@pytest.mark.parametrize(
    ("name", "pp", "n", "lists"),
    [
        ("1f1b", 2, 3, ["F0.0 F0.1 BW0.0 F0.2 BW0.1 BW0.2", "F1.0 BW1.0 F1.1 BW1.1 F1.2 BW1.2"]),
        # The last of three ranks owes two weight gradients at most between micro-batches, the first none.
        (
            "zb1p", 3, 4,
            ["F0.0 F0.1 F0.2 B0.0 W0.0 F0.3 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3",
             "F1.0 F1.1 B1.0 F1.2 B1.1 W1.0 F1.3 B1.2 W1.1 B1.3 W1.2 W1.3",
             "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 W2.0 F2.3 B2.3 W2.1 W2.2 W2.3"],
        ),
        # Micro-batches 0 and 1 enter at rank 0, 2 and 3 at rank 1.
        (
            "dualpipe", 2, 4,
            ["F0.0 F1.2 F0.1 BW1.2 F1.3&BW0.0 BW1.3 B0.1 W0.1", "F0.2 F1.0 F0.3 BW1.0 F1.1&BW0.2 BW1.1 B0.3 W0.3"],
        ),
        ("dualpipev", 1, 3, ["F0.0 F1.0 F0.1 BW1.0 F1.1&BW0.0 F0.2&BW1.1 F1.2&BW0.1 BW1.2 B0.2 W0.2"]),
        (
            "dualpipev", 2, 4,
            ["F0.0 F0.1 F0.2 F3.0 B3.0 W3.0 F3.1 F0.3&BW3.1 F3.2&BW0.0 BW3.2 F3.3&BW0.1 BW3.3 B0.2 W0.2 B0.3 W0.3",
             "F1.0 F2.0 F1.1 F2.1 F1.2 BW2.0 F2.2&BW1.0 F1.3&BW2.1 F2.3&BW1.1 BW2.2 BW1.2 B2.3 B1.3 W2.3 W1.3"],
        ),
    ],
)  # fmt: skip
def test_small_lists_by_hand(name: str, pp: int, n: int, lists: list[str]) -> None:
    assert [written(actions) for actions in build_schedule(name, pp, n).actions] == lists


def test_the_eight_phases_of_the_published_picture() -> None:
    """8 ranks, 20 micro-batches: how often each phase's pattern repeats, read off the paper's figure."""
    repeats = {0: (6, 1, 3, 3, 3, 1, 3, 1), 1: (4, 2, 2, 4, 2, 2, 2, 2), 3: (0, 4, 0, 6, 0, 4, 0, 4)}
    width = (1, 2, 3, 2, 2, 2, 2, 1)  # actions of one repetition
    schedule = dualpipe(8, 20)
    assert schedule.phases == PHASES and len(PHASES) == 8
    for rank, counts in repeats.items():
        for mirror in (rank, 7 - rank):
            found = Counter(action.phase for action in schedule.actions[mirror])
            split = 1 if rank == 3 else 0  # the middle ranks' first pair stands as F and BW
            assert [found[phase] for phase in range(1, 9)] == [
                count * many + split * (phase == 4)
                for phase, (count, many) in enumerate(zip(counts, width, strict=True), start=1)
            ]
            phases = [action.phase for action in schedule.actions[mirror]]
            assert phases == sorted(phases)


def renamed(
    actions: tuple[Action, ...], stages: dict[int, int], shift: int, directions: dict[int, int]
) -> list[Action]:
    def one(action: Action | None) -> Action | None:
        if action is None:
            return None
        return Action(
            action.kind, stages[action.stage], action.microbatch - shift * action.direction,
            directions[action.direction], one(action.paired),
        )  # fmt: skip

    return [out for action in actions if (out := one(action)) is not None]


@pytest.mark.parametrize(("ranks", "m"), [(1, 2), (2, 4), (3, 9), (4, 8), (8, 60)])
def test_the_v_is_the_bidirectional_list_cut_at_the_fold(ranks: int, m: int) -> None:
    both, cut = dualpipe(2 * ranks, 2 * m), dualpipev(ranks, m)
    same = {stage: stage for stage in range(2 * ranks)}
    for rank in range(ranks):
        assert renamed(both.actions[rank], same, m, {0: 0, 1: 0}) == list(cut.actions[rank])


@pytest.mark.parametrize(("pp", "n"), [(2, 4), (6, 20), (8, 20)])
def test_mirrored_ranks_run_one_list_with_directions_swapped(pp: int, n: int) -> None:
    schedule = dualpipe(pp, n)
    for rank in range(pp):
        mirror = [
            (action.kind, action.stage, 1 - action.direction, (action.microbatch + n // 2) % n)
            for action in schedule.actions[pp - 1 - rank]
        ]
        assert mirror == [(a.kind, a.stage, a.direction, a.microbatch) for a in schedule.actions[rank]]


def test_where_stages_are_and_which_way_a_micro_batch_goes() -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    assert [schedule.held_by(rank) for rank in range(4)] == [
        ((0, 0), (1, 3)), ((0, 1), (1, 2)), ((0, 2), (1, 1)), ((0, 3), (1, 0)),
    ]  # fmt: skip
    assert [schedule.direction_of(i) for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert schedule.neighbour(3, 0, +1) is None and schedule.neighbour(0, 1, -1) is None
    assert schedule.neighbour(1, 0, +1) == 2 and schedule.neighbour(1, 1, +1) == 1
    cut = build_schedule("dualpipev", 3, 6)
    assert cut.placement == ((0, 1, 2, 2, 1, 0),) and num_stages("dualpipev", 3) == 6
    assert cut.neighbour(2, 0, +1) is None  # the turn: both stages are on the last rank
    assert schedule.is_folded and cut.is_folded and not build_schedule("zb1p", 4, 8).is_folded
    assert not build_schedule("1f1b", 1, 8).is_folded


def compute_index(schedule: Schedule, rank: int) -> list[int]:
    """For each action, how many computations stand before it."""
    before = [0]
    for action in schedule.actions[rank]:
        before.append(before[-1] + (not action.kind.is_message))
    return before


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pp", "n"), [(2, 4), (4, 12), (8, 16)])
def test_messages_leave_at_once_and_are_awaited_one_computation_ahead(name: str, pp: int, n: int) -> None:
    schedule = build_schedule(name, pp, n)
    ahead: Counter[int] = Counter()
    for rank, actions in enumerate(schedule.actions):
        before = compute_index(schedule, rank)
        needed_at = {part[:3]: before[i] for i, action in enumerate(actions) for part in action.parts()}
        for i, action in enumerate(actions):
            if action.kind.is_send:
                carrier = next(a for a in reversed(actions[:i]) if not a.kind.is_message)
                part = Kind.F if action.kind is Kind.SEND_F else Kind.B
                assert (part, action.stage, action.microbatch) in [p[:3] for p in carrier.parts()]
            elif action.kind.is_message:
                part = Kind.F if action.kind is Kind.RECV_F else Kind.B
                ahead[needed_at[part, action.stage, action.microbatch] - before[i]] += 1
    assert ahead.total() == sum(a.kind.is_send for actions in schedule.actions for a in actions)
    # The very first computation has none before it; more than one ahead only where the link's order asks for it.
    assert ahead[0] <= pp and min(ahead) >= 0 and ahead[1] >= 0.5 * ahead.total()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_link_receives_in_the_order_in_which_it_sends(name: str) -> None:
    schedule = build_schedule(name, 6, 14)
    links: dict[tuple[int | None, int | None], tuple[list[object], list[object]]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind.is_send:
                links.setdefault((rank, action.peer), ([], []))[0].append(action.message)
            elif action.kind.is_message:
                key = (action.kind, action.stage, action.microbatch)
                links.setdefault((action.peer, rank), ([], []))[1].append(key)
    assert len(links) == 10  # five pairs of neighbours, both directions
    assert all(sent == posted for sent, posted in links.values())


def test_one_rank_overlaps_without_a_pipeline() -> None:
    (actions,) = build_schedule("dualpipev", 1, 10).actions
    kinds = Counter(action.kind for action in actions)
    assert kinds == {Kind.F: 3, Kind.FB: 17, Kind.BW: 2, Kind.B: 1, Kind.W: 1}


def test_half_the_drain_is_split_and_owes_its_weight_gradients() -> None:
    for depth, actions in enumerate(dualpipe(12, 24).actions[:6]):
        drain = [action.kind for action in actions if action.phase == 6]
        assert drain == [Kind.BW] * (depth + 1) + [Kind.B] * (depth + 1)


@pytest.mark.parametrize(
    ("name", "pp", "n", "says"),
    [
        ("dualpipe", 3, 12, "pp=3 is odd: use 2 or 4"),
        ("dualpipe", 1, 12, "pp=1 is odd: use 2"),
        ("dualpipe", 0, 12, "use at least 2"),
        ("dualpipe", 8, 14, "at least 16 micro-batches (2 a rank), and 14 are too few: use 16"),
        ("dualpipe", 8, 15, "too few: use 16"),
        ("dualpipe", 8, 17, "17 is odd: use 16 or 18"),
        ("dualpipev", 8, 15, "at least 16 micro-batches (2 a rank), and 15 are too few: use 16"),
        ("dualpipev", 0, 15, "use at least 1"),
        ("1f1b", 4, 0, "at least 1 micro-batch, not 0"),
        ("zb1p", 4, -1, "at least 1 micro-batch, not -1"),
        ("gpipe", 4, 8, "unknown: use 1f1b, zb1p, dualpipe, dualpipev"),
    ],
)
def test_sizes_that_do_not_exist(name: str, pp: int, n: int, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        build_schedule(name, pp, n)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "pp", "n"), [("dualpipe", 2, 4), ("dualpipev", 1, 2), ("1f1b", 1, 1), ("zb1p", 9, 1)])
def test_the_least_sizes_exist(name: str, pp: int, n: int) -> None:
    schedule = build_schedule(name, pp, n)
    assert (schedule.num_ranks, schedule.num_microbatches) == (pp, n)
    assert all(a.phase <= b.phase for actions in schedule.actions for a, b in pairwise(actions))


@pytest.mark.parametrize(
    ("name", "pp", "n", "lists"),
    [
        ("zb1p", 2, 3, ["F0.0 F0.1 F0.2", "F1.0 F1.1 F1.2"]),
        ("dualpipev", 2, 3, ["F0.0 F0.1 F0.2 F3.0 F3.1 F3.2", "F1.0 F2.0 F1.1 F2.1 F1.2 F2.2"]),
        ("dualpipe", 2, 3, ["F0.0 F0.1 F1.2", "F0.2 F1.0 F1.1"]),  # the third of three is of direction 1
    ],
)
def test_forwards_alone_reach_stages_as_a_full_pipeline_would(name: str, pp: int, n: int, lists: list[str]) -> None:
    schedule = build_schedule(name, pp, 2 * pp)
    alone = forwards(schedule, n)
    assert [written(actions) for actions in alone.actions] == lists
    assert (alone.name, alone.num_microbatches, alone.phases) == (f"{name}, forwards", n, ("F",))
    assert schedule.has_backward and not alone.has_backward
    kinds = Counter(action.kind for actions in alone.actions for action in actions)
    crossings = sum(a != b for ranks in schedule.placement for a, b in pairwise(ranks)) / schedule.num_directions
    assert kinds[Kind.SEND_F] == kinds[Kind.RECV_F] == n * crossings and kinds[Kind.SEND_B] == 0
