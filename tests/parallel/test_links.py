"""Links between pipeline ranks: any strides arrive right, one group a direction, no buffer dropped early."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.parallel import hang, links
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh, build_mesh
from fp8moe.profile.spans import Recorder, exposed_seconds, listening
from tests.parallel.ranks import TIMEOUT, run_ranks

SECOND = timedelta(seconds=1)
PP, DP = 4, 2


def crossed() -> list[list[float]]:
    """Rank 0 sends a transposed, a strided and an expanded tensor down a link and gets them doubled in return."""
    mesh = build_mesh(2, 1, 1, timeout=TIMEOUT)
    pipeline = Links(mesh, timedelta(seconds=30))
    pipeline.warm_up(torch.device("cpu"))
    whole = torch.arange(12.0).view(3, 4)
    sent = [whole.T, whole[:, 1:3], torch.arange(3.0)[:, None].expand(3, 2)]
    got = []
    for number, tensor in enumerate(sent):
        buffer = torch.full(tensor.shape, float("nan"))
        if mesh.pp_rank == 0:
            pipeline.send(tensor, 1, f"F{number}")
            got.append(pipeline.receive(buffer, 1, f"B{number}").wait().tolist())
        else:
            there = pipeline.receive(buffer, 0, f"F{number}").wait()
            assert torch.equal(there, tensor)
            pipeline.send((2 * there).T.contiguous().T, 0, f"B{number}")
    pipeline.finish()
    return got


def test_tensors_of_any_strides_arrive_right() -> None:
    whole = torch.arange(12.0).view(3, 4)
    expected = [whole.T, whole[:, 1:3], torch.arange(3.0)[:, None].expand(3, 2)]
    assert run_ranks(crossed, 2) == [[(2 * tensor).tolist() for tensor in expected], []]


class Group:
    def __init__(self, group_desc: str) -> None:
        self.group_desc = group_desc


class Work:
    """What isend or irecv give."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name, self.done = log, name, False

    def is_completed(self) -> bool:
        return self.done

    def wait(self, timeout: timedelta) -> None:
        self.log.append(("wait", self.name, timeout))
        self.done = True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that is started and waited for, in place of torch's: (what, global rank of the peer, group)."""
    log: list[Any] = []

    def start(kind: str) -> Any:
        def call(tensor: Tensor, peer: int, group: Group) -> Work:
            log.append((kind, peer, group.group_desc))
            work = Work(log, f"{kind} {peer}")
            works.append((work, tensor))
            return work

        return call

    works: list[tuple[Work, Tensor]] = []
    monkeypatch.setattr(links.dist, "isend", start("send"))
    monkeypatch.setattr(links.dist, "irecv", start("receive"))
    monkeypatch.setattr(links, "_works", works, raising=False)
    return log


def of_rank(pp_rank: int, dp_rank: int = 1) -> Links:
    mesh = Mesh(PP, DP, 1, pp_rank * DP + dp_rank, up_group=Group("up1"), down_group=Group("down1"))  # type: ignore
    return Links(mesh, SECOND)


def test_each_direction_has_a_group_of_its_own_and_ranks_are_global(log: list[Any]) -> None:
    pipeline = of_rank(2)
    pipeline.send(torch.zeros(1), 3, "up")
    pipeline.send(torch.zeros(1), 1, "down")
    pipeline.receive(torch.zeros(1), 1, "up")
    pipeline.receive(torch.zeros(1), 3, "down")
    assert log == [("send", 7, "up1"), ("send", 3, "down1"), ("receive", 3, "up1"), ("receive", 7, "down1")]


def test_messages_are_reported_by_link_under_their_names(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    real = hang.message
    monkeypatch.setattr(hang, "message", lambda group, *rest: (reported.append((group.group_desc, *rest)),
                                                               real(group, *rest))[1])  # fmt: skip
    pipeline = of_rank(2)
    pipeline.send(torch.zeros(1), 1, "SEND_B2.0->rank 1")
    arrival = pipeline.receive(torch.zeros(1), 1, "RECV_F2.1<-rank 1")
    assert reported == [("down1", 5, 3, "SEND_B2.0->rank 1"), ("up1", 3, 5, "RECV_F2.1<-rank 1")]
    kept = Recorder()
    with listening(kept):
        arrival.wait()
    assert [span.name for span in kept.spans] == ["wait RECV_F2.1<-rank 1"]


def test_a_receive_gives_its_buffer_once_and_waits_no_longer_than_the_timeout(log: list[Any]) -> None:
    pipeline, buffer = of_rank(1), torch.ones(2)
    arrival = pipeline.receive(buffer, 0, "RECV_F1.0<-rank 0")
    exposed_seconds()
    assert arrival.wait() is buffer
    assert exposed_seconds() > 0
    assert log[-1] == ("wait", "receive 1", SECOND)
    with pytest.raises(AttributeError):
        arrival.wait()


def test_what_is_sent_is_kept_until_it_has_left_and_finish_waits_for_the_rest(log: list[Any]) -> None:
    pipeline = of_rank(0)
    for number in range(3):
        pipeline.send(torch.full((2, 2), float(number)).T, 1, f"F{number}")
    works: list[tuple[Work, Tensor]] = links._works  # type: ignore[attr-defined]
    assert all(tensor.is_contiguous() for _, tensor in works)
    assert [tensor for tensor, *_ in pipeline._sends] == [tensor for _, tensor in works]
    works[0][0].done = works[1][0].done = True
    pipeline.send(torch.zeros(1), 1, "F3")
    assert [send[1] for send in pipeline._sends] == [works[2][0], works[3][0]]
    del log[:]
    kept = Recorder()
    with listening(kept):
        pipeline.finish()
    assert log == [("wait", "send 3", SECOND)] * 2 and pipeline._sends == []
    assert [span.name for span in kept.spans] == ["wait until all has left"] * 2


def test_warm_up_crosses_every_link_once_and_no_ranks_wait_in_a_circle(log: list[Any]) -> None:
    lists = []
    for rank in range(PP):
        del log[:]
        of_rank(rank, dp_rank=0).warm_up(torch.device("cpu"))
        lists.append(deque((what, peer // DP) for what, peer, _ in log if what != "wait"))
        assert [entry[0] for entry in log[1::2]] == ["wait"] * (len(log) // 2)  # each is waited for before the next
    crossings: list[tuple[int, int]] = []
    moving = True
    while moving:  # a message moves when both of its ends are at it
        moving = False
        for rank, actions in enumerate(lists):
            if actions and actions[0][0] == "send" and list(lists[actions[0][1]])[:1] == [("receive", rank)]:
                crossings.append((rank, actions.popleft()[1]))
                lists[crossings[-1][1]].popleft()
                moving = True
    assert not any(lists)
    assert sorted(crossings) == sorted([(a, a + 1) for a in range(PP - 1)] + [(a + 1, a) for a in range(PP - 1)])


def test_a_pipeline_of_one_rank_has_no_links() -> None:
    with pytest.raises(AssertionError, match="no links"):
        Links(Mesh(1, 1, 1, 0), SECOND).send(torch.zeros(1), 1, "F0")
