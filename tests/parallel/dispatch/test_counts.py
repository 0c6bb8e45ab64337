"""Too many rows for a rank: refused before they are allocated, or noticed before the step, never dropped silently."""

from __future__ import annotations

import pytest
import torch

from fp8moe.errors import ImbalanceError
from fp8moe.kernels.permute import plan_rows
from fp8moe.parallel.dispatch import all_to_all, make_dispatcher
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop
from fp8moe.parallel.dispatch.counts import Capacity, histogram
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
    all_to_all.plan_rows = lambda *a, **k: (asked.append(k["room"]), plan_rows(*a, **k))[1]  # type: ignore
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
    """Two batches announced, then dispatched the other way round, against each announced where it is dispatched."""
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
