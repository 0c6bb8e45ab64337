"""Too many rows for a rank: refused before they are allocated, or noticed before the step, never dropped silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe.errors import ImbalanceError
from fp8moe.kernels.permute import RowMap, plan_rows
from fp8moe.parallel.dispatch import all_to_all, counts, make_dispatcher
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop
from fp8moe.parallel.dispatch.counts import Capacity, EpTopology, histogram
from fp8moe.parallel.dispatch.hops import Splits
from fp8moe.parallel.mesh import build_mesh
from tests.parallel.ranks import TIMEOUT, run_ranks

E, T, D = 8, 32, 16
ROWS, WEIGHTS = torch.ones(T, D), torch.ones(T, 2)
ALL_TO_ONE = torch.tensor([[5, 4]]).expand(T, 2)
EVEN = torch.arange(2 * T).view(T, 2) % E
KINDS = ["all_to_all", "node_limited"]


def skewed(kind: str, limit: float) -> tuple[str, list[int]]:
    """Everything to experts 4 and 5, with a limit: what the rank raises, and the rooms it asked for."""
    mesh = build_mesh(1, 4, 4, timeout=TIMEOUT, ranks_per_node=2)
    dispatcher = make_dispatcher(kind, mesh, E, max_tokens=T, max_imbalance=limit)
    asked: list[int] = []
    plan_rows = all_to_all.plan_rows

    def noting(*args: Any, **kwargs: Any) -> RowMap:
        if kwargs.get("align") is None:  # the plan of the experts' rows, not that of their order
            asked.append(kwargs["room"])
        return plan_rows(*args, **kwargs)

    all_to_all.plan_rows = noting  # type: ignore[assignment]
    try:
        arrived = dispatcher.dispatch(ROWS, dispatcher.announce(ALL_TO_ONE), WEIGHTS).wait()
    except ImbalanceError as error:
        return str(error), asked
    y = dispatcher.combine(arrived.rows_RD, arrived.state).wait()
    assert torch.equal(y, 2 * ROWS)
    return "", asked


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_bound(kind: str) -> None:
    for rank, (error, asked) in enumerate(run_ranks(skewed, 4, kind, 4.0)):
        # R is what came, padded to 128 an expert, and nothing on ranks that nobody chose.
        assert (error, asked) == ("", [256 if rank == 2 else 0])


def only_the_full_rank(kind: str) -> str:
    """As `skewed`; ranks that have room would wait for the one that refused, so they don't take part further."""
    try:
        return skewed(kind, 3.9)[0]
    except RuntimeError:
        return "a peer has gone"


@pytest.mark.parametrize("kind", KINDS)
def test_an_imbalance_past_the_limit_is_refused_before_the_allocation(kind: str) -> None:
    error = run_ranks(only_the_full_rank, 4, kind, absent=(0, 1, 3))[2]
    assert "would receive 256 rows, 4.00 times the even share, and parallel.max_imbalance=3.9 allows 249" in error
    assert "tokens per expert from expert 4 on: 128, 128" in error


def announced_early(kind: str, factor: float | None) -> bool:
    """Two batches announced, then dispatched in reverse order, against each announced where it is dispatched."""
    mesh = build_mesh(1, 4, 4, timeout=TIMEOUT, ranks_per_node=2)
    dispatcher = make_dispatcher(kind, mesh, E, max_tokens=T, capacity_factor=factor, chunks=2)
    batches = [EVEN[: 5 + mesh.rank], ALL_TO_ONE]
    expected = [dispatcher.dispatch(ROWS[: len(i)], dispatcher.announce(i), WEIGHTS[: len(i)]).wait() for i in batches]
    announcements = [dispatcher.announce(ids) for ids in batches]
    if factor is None:  # the counts travel before anything is dispatched
        assert all(a.sizes.future.result(timeout=20) for a in announcements)
    late = [dispatcher.dispatch(ROWS[: len(a.topk_ids_TK)], a, WEIGHTS[: len(a.topk_ids_TK)])
            for a in reversed(announcements)]  # fmt: skip
    got = [message.wait() for message in reversed(late)]
    names = ("rows_RD", "weights_R", "group_offsets")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for a, b in zip(expected, got, strict=True) for n in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [None, 4.0])
def test_counts_may_travel_long_before_their_rows(kind: str, factor: float | None) -> None:
    assert run_ranks(announced_early, 4, kind, factor) == [True] * 4


def fixed(kind: str, factor: float) -> list[str]:
    """Rounds with fixed messages: what `verify` raises after an even one, a skewed one, and an even one again."""
    mesh = build_mesh(1, 4, 4, timeout=TIMEOUT, ranks_per_node=2)
    dispatcher = make_dispatcher(kind, mesh, E, max_tokens=T, capacity_factor=factor)
    told = []
    for ids in (EVEN, ALL_TO_ONE, EVEN):
        arrived = dispatcher.dispatch(ROWS, dispatcher.announce(ids), WEIGHTS).wait()
        y = dispatcher.combine(arrived.rows_RD, arrived.state).wait()
        try:
            dispatcher.verify()
            assert torch.equal(y, 2 * ROWS)
            told.append("")
        except ImbalanceError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_is_an_error_before_the_step_on_every_rank(kind: str) -> None:
    for before, during, after in run_ranks(fixed, 4, kind, 1.0):
        assert (before, after) == ("", "")
        assert "parallel.capacity_factor=1.0" in during and "no step is taken" in during
        assert "tokens per expert since the last step: 0, 0, 0, 0, 128, 128, 0, 0" in during
    assert run_ranks(fixed, 4, kind, 4.0) == [["", "", ""]] * 4


class Pair:
    """A group of two ranks that never communicates."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def test_more_tokens_than_messages_were_sized_for() -> None:
    dispatcher = AllToAllDispatcher(*one_hop(Pair(), E), capacity=Capacity(T - 1, 2.0))  # type: ignore[arg-type]
    dispatcher.announce(EVEN[1:])
    says = "32 tokens exceed the 31 that fixed messages were sized for: dispatch at most 31 at once"
    with pytest.raises(ValueError, match=says):
        dispatcher.announce(EVEN)


def test_a_map_with_less_room_than_rows_cuts_the_last_and_says_how_many_there_are() -> None:
    ids = torch.tensor([[0], [1], [1], [0], [1]])
    whole, cut = plan_rows(ids, 2, align=2), plan_rows(ids, 2, align=2, room=4)
    assert len(whole.slot_R) == 6
    assert torch.equal(cut.slot_R, whole.slot_R[:4]) and cut.group_offsets.tolist() == [0, 2, 4]
    assert torch.equal(cut.tokens_per_expert, whole.tokens_per_expert)
    tight = plan_rows(ids, 2, align=2, room=2)
    assert torch.equal(tight.slot_R, whole.slot_R[:2]) and tight.group_offsets.tolist() == [0, 2, 2]
    roomy = plan_rows(ids, 2, align=2, room=9)
    assert torch.equal(roomy.slot_R[:6], whole.slot_R) and (roomy.slot_R[6:] == -1).all()
    assert torch.equal(roomy.group_offsets, whole.group_offsets)


def test_a_long_histogram_names_the_heaviest() -> None:
    text = histogram([1] * 100 + [900])
    assert text.startswith("100: 900, 0: 1, ") and text.endswith("mean 9.9")


def spilled(copies: list[int]) -> tuple[str, list[int]]:
    """Two ranks; every token's two experts are rank 0's, `copies` of each from each rank: what `verify` raises.

    No message overflows: a token is one row for rank 0, however many of its experts are there.
    """
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    tokens = sum(copies) // 2
    dispatcher = make_dispatcher("all_to_all", mesh, E, max_tokens=tokens, capacity_factor=1.0)
    flat = torch.repeat_interleave(torch.arange(4), torch.tensor(copies))
    ids = torch.stack([flat[:tokens], flat[tokens:]], dim=1)
    rows = torch.ones(tokens, D)
    arrived = dispatcher.dispatch(rows, dispatcher.announce(ids), torch.ones(tokens, 2)).wait()
    dispatcher.combine(arrived.rows_RD, arrived.state).wait()
    try:
        dispatcher.verify()
    except ImbalanceError as error:
        return str(error), []
    return "", arrived.group_offsets.tolist() if mesh.rank == 0 else []


def test_rows_that_fit_unpadded_and_not_padded_overflow() -> None:
    """Room is 2 x 160 copies in 3 tiles and a tile for each of 4 experts, 896 rows; 640 copies come either way."""
    for answer in run_ranks(spilled, 2, [65, 65, 65, 125]):  # 130 130 130 250: 256 + 256 + 256 + 256 rows
        assert answer[0].startswith("1 of this step's dispatches had more rows than parallel.capacity_factor=1.0")
    fits = run_ranks(spilled, 2, [64, 64, 128, 64])  # 128 128 256 128: no padding at all
    assert fits == [("", [0, 128, 256, 512, 640]), ("", [])]


@pytest.mark.parametrize(
    "tokens, chunks, expected",
    [(7, 3, [3, 3, 1]), (6, 3, [2, 2, 2]), (2, 3, [1, 1, 0]), (0, 2, [0, 0]), (5, 1, [5]), (4, 3, [2, 2, 0])],
)
def test_tokens_of_each_chunk(tokens: int, chunks: int, expected: list[int]) -> None:
    exact = AllToAllDispatcher(*one_hop(Pair(), E), chunks=chunks)  # type: ignore[arg-type]
    assert exact._chunk_tokens(tokens) == expected
    full = Capacity(12, 2.0)
    padded = AllToAllDispatcher(*one_hop(Pair(), E), chunks=chunks, capacity=full)  # type: ignore[arg-type]
    step = 12 // chunks
    assert padded._chunk_tokens(tokens) == [min(step, max(0, tokens - i * step)) for i in range(chunks)]


def test_the_rooms_of_fixed_messages() -> None:
    """Two nodes of two ranks, 8 experts, top-2, 24 tokens in 2 chunks of 12, a factor of 1.5."""
    topology = EpTopology(Pair(), E, nodes=2, ranks_per_node=2)  # type: ignore[arg-type]
    sizes = counts.fixed(2, 2, topology, Capacity(24, 1.5))
    # A token visits both nodes at most: 12 of 12. On arrival 24 rows, of which a rank gets 12 x 2/4 x 2 x 1.5 = 18.
    assert [[(s.sent, s.received, s.fixed) for s in chunk] for chunk in sizes.splits] == [
        [([12, 12], [12, 12], True), ([18, 18], [18, 18], True)]
    ] * 2
    assert sizes.room == (1 + 2) * 128  # 1.5 x 48 copies are one tile, and one an expert
    line = EpTopology(Pair(), E, nodes=4, ranks_per_node=1)  # type: ignore[arg-type]
    (one,) = counts.fixed(1, 1, line, Capacity(10, 1.5)).splits
    assert [s.sent for s in one] == [[4] * 4]  # 1.5 x 10/4, rounded up
    node = EpTopology(Pair(), E, nodes=1, ranks_per_node=4)  # type: ignore[arg-type]
    (only,) = counts.fixed(1, 8, node, Capacity(10, 1.5)).splits
    assert [s.sent for s in only] == [[10] * 4]  # never more than all tokens
    assert [counts.hops_of(t) for t in (topology, line, node)] == [(True, True), (True, False), (False, True)]


def test_room_is_at_least_one_row_and_at_most_what_can_come() -> None:
    capacity = Capacity(8, 1.25)
    assert [capacity.share(even, 10) for even in (0.0, 0.5, 4.0, 4.1, 8.0, 9.0)] == [1, 1, 5, 6, 10, 10]


def test_the_limit_itself_is_allowed() -> None:
    topology = EpTopology(Pair(), E, nodes=2, ranks_per_node=1)  # type: ignore[arg-type]
    counts.check_imbalance([10, 20, 0, 0], 15.0, 2.0, topology)
    says = r"receive 31 rows, 2\.07 times .*max_imbalance=2\.0 allows 30: .* from expert 0 on: 10, 21, 0, 0\)"
    with pytest.raises(ImbalanceError, match=says):
        counts.check_imbalance([10, 21, 0, 0], 15.0, 2.0, topology)
    assert int(counts.padded_rows(torch.tensor([0, 1, 127, 128, 129]))) == 128 * (0 + 1 + 1 + 1 + 2)


def test_a_histogram_of_64_experts_is_written_out() -> None:
    assert histogram(list(range(64))) == ", ".join(map(str, range(64)))
    assert histogram(list(range(65))).startswith("64: 64, 63: 63, ") and histogram(list(range(65))).count(":") == 16


@pytest.mark.parametrize("folded", [1, 3, 256])
def test_an_overflow_is_forgotten_once_it_is_checked(monkeypatch: pytest.MonkeyPatch, folded: int) -> None:
    """A dispatch counts once, whether its rows for a peer, or those of its experts once padded, had no room."""
    monkeypatch.setattr(counts, "all_reduce", lambda tensor, *rest: tensor)
    monkeypatch.setattr(counts, "FOLDED", folded)
    topology = EpTopology(Pair(), 4, nodes=2, ranks_per_node=1)  # type: ignore[arg-type]
    overflow = counts.Overflow(topology, Capacity(8, 1.0))
    overflow.check()  # nothing was dispatched
    sizes = counts.MessageSizes([[Splits([4, 4], [4, 4], fixed=True)]], 256)
    fits = ([4, 3], [128, 1])
    for peers, experts in (([4, 5], [128, 1]), fits, ([9, 4], [129, 1]), ([4, 4], [1, 129])):
        needed = counts.Needed([torch.tensor(peers)], torch.tensor(experts))
        overflow.note(needed, sizes, torch.tensor([[0, 3], [1, 3]]))
        assert len(overflow._needed) < folded
    with pytest.raises(ImbalanceError, match=r"3 of this step's dispatches had .*since the last step: 4, 4, 0, 8\)"):
        overflow.check()
    overflow.note(counts.Needed([torch.tensor(fits[0])], torch.tensor(fits[1])), sizes, torch.tensor([[0, 3]]))
    overflow.check()
