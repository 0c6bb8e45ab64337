"""The adapter to DeepEP, against a fake of the package with the same interface, which gathers everything instead.

What is proved here is the adapter's side: arguments, what it does with results, and that a run's other parts see no
difference. That DeepEP itself keeps this interface is known on a machine that has it.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.layers.recipe import Precision
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.dispatch.deep_ep import check_deep_ep
from fp8moe.parallel.mesh import build_mesh
from tests.parallel.dispatch.test_all_to_all import CASES, Case, E, verbs
from tests.parallel.ranks import TIMEOUT, run_ranks


class Event:
    def current_stream_wait(self) -> None:
        pass


def gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    out: list[Any] = [None] * group.size()
    dist.all_gather_object(out, value, group=group)
    return out


class Buffer:
    """DeepEP's normal kernels, as far as the adapter uses them; rows arrive by source rank, then token."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group

    @staticmethod
    def capture() -> Event:
        return Event()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        size = self.group.size()
        in_rank = torch.zeros(len(topk_idx), size, dtype=torch.bool)
        in_rank.scatter_(1, topk_idx // (num_experts // size), True)
        return in_rank.sum(0), None, torch.bincount(topk_idx.flatten(), minlength=num_experts), in_rank, Event()

    def dispatch(self, x: Any, *, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        me, cached = self.group.rank(), handle is not None
        topk_idx, topk_weights = given.get("topk_idx"), given.get("topk_weights")
        is_token_in_rank = handle if cached else given["is_token_in_rank"]
        parts = x if isinstance(x, tuple) else (x,)
        asked = [p.view(torch.uint8) if p.itemsize == 1 else p for p in parts]
        everyone = gathered((asked, topk_idx, topk_weights, is_token_in_rank), self.group)
        mine = [
            torch.cat([got[0][i][got[3][:, me]] for got in everyone]).view(part.dtype) for i, part in enumerate(parts)
        ]
        received = tuple(mine) if isinstance(x, tuple) else mine[0]
        if cached:
            return received, None, None, None, None, Event()
        ids = torch.cat([got[1][got[3][:, me]] for got in everyone])
        e = E // self.group.size()
        here = ids // e == me
        weights = torch.cat([got[2][got[3][:, me]] for got in everyone]).masked_fill(~here, 0.0)
        local = torch.where(here, ids % e, -1)
        tokens_e = torch.bincount(local[here], minlength=e).tolist()
        return received, local, weights, tokens_e, is_token_in_rank, Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **_: Any) -> tuple[Any, ...]:
        me = self.group.rank()
        everyone = gathered((x, topk_weights, handle), self.group)
        total = torch.zeros(len(handle), x.shape[1])
        weights = None if topk_weights is None else torch.zeros(len(handle), topk_weights.shape[1])
        in_ranks = [got[2] for got in everyone]
        for rank, (rows, row_weights, _) in enumerate(everyone):
            start = sum(int(in_rank[:, rank].sum()) for in_rank in in_ranks[:me])
            tokens = handle[:, rank].nonzero()[:, 0]
            total[tokens] += rows[start : start + len(tokens)].float()
            if weights is not None:
                weights[tokens] += row_weights[start : start + len(tokens)]
        return total.to(x.dtype), weights, Event()


def both(case: Case) -> list[dict[str, Tensor]]:
    module = types.ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    start = sum(case[2][: mesh.rank])
    tokens = slice(start, start + case[2][mesh.rank])
    kinds = ("all_to_all", "deep_ep")
    made = [make_dispatcher(kind, mesh, E, max_tokens=0) for kind in kinds]
    return [verbs(d, case, 2, tokens, mesh.rank * d.num_local_experts) for d in made]


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "fp32"])
def test_the_adapter_gives_what_the_default_gives(case: Case) -> None:
    for ours, theirs in run_ranks(both, 2, case):
        for name in ours:
            exact = name in ("rows", "weights", "offsets", "back")
            close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(theirs[name].float(), ours[name].float(), **close)


def test_it_is_refused_where_it_can_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs the package deep_ep, which is not installed"):
        check_deep_ep(Precision.FP8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_deep_ep(Precision.FP8)
    with pytest.raises(ValueError, match="not precision=fp32: use all_to_all"):
        check_deep_ep(Precision.FP32)


class Counted:
    """An event that counts how often a stream waits for it."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream_wait(self) -> None:
        self.waits += 1


class Recording:
    """A buffer that keeps its arguments; each verb's results come with an event of their own."""

    def __init__(self, group: Any, nvlink_bytes: int, rdma_bytes: int) -> None:
        self.sizes = (nvlink_bytes, rdma_bytes)
        self.events = [Counted() for _ in range(4)]
        self.asked: list[dict[str, Any]] = []

    def capture(self) -> str:
        return "captured"

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **asked: Any) -> tuple[Any, ...]:
        self.asked.append(asked)
        return 1, 2, 3, 4, self.events[0]

    def dispatch(self, x: Any, **asked: Any) -> tuple[Any, ...]:
        self.asked.append(asked)
        ids = torch.tensor([[0], [1]])
        return x, ids, torch.ones(2, 1), [1, 1], "handle", self.events[1]

    def combine(self, x: Tensor, handle: Any, **asked: Any) -> tuple[Any, ...]:
        self.asked.append({"handle": handle, **asked})
        return x, asked.get("topk_weights"), self.events[2]


def recording(monkeypatch: pytest.MonkeyPatch, ranks: int) -> Any:
    monkeypatch.setitem(sys.modules, "deep_ep", types.SimpleNamespace(Buffer=Recording))
    mesh = types.SimpleNamespace(ep_group=types.SimpleNamespace(size=lambda: ranks))
    return make_dispatcher("deep_ep", mesh, 16, max_tokens=0)  # type: ignore[arg-type]


def test_each_verb_waits_for_its_event_once_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = recording(monkeypatch, 8)
    buffer = dispatcher._buffer
    announced = dispatcher.announce(torch.tensor([[0], [1]]))
    assert buffer.events[0].waits == 0
    message = dispatcher.dispatch(torch.ones(2, 16), announced, torch.ones(2, 1))
    assert (buffer.events[0].waits, buffer.events[1].waits) == (1, 0)  # the counts are needed to start
    arrived = message.wait()
    assert buffer.events[1].waits == 1
    combined = dispatcher.combine(arrived.rows_RD, arrived.state)
    assert buffer.events[2].waits == 0
    assert combined.wait().shape == (2, 16) and buffer.events[2].waits == 1
    dx, dweights = dispatcher.dispatch_backward(arrived.rows_RD, arrived.weights_R, arrived.state).wait()
    assert dweights.tolist() == [[1.0], [1.0]] and dx.shape == (2, 16)
    options = {"previous_event": "captured", "async_finish": True, "allocate_on_comm_stream": True}
    assert all(options.items() <= asked.items() for asked in buffer.asked)
    assert {"num_tokens_per_rank": 1, "num_tokens_per_rdma_rank": 2, "num_tokens_per_expert": 3,
            "is_token_in_rank": 4}.items() <= buffer.asked[1].items()  # fmt: skip
    assert [asked["handle"] for asked in buffer.asked[2:]] == ["handle", "handle"]


@pytest.mark.parametrize("ranks, rdma", [(8, 0), (16, 2**30)])
def test_memory_for_other_nodes_is_kept_only_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, ranks: int, rdma: int
) -> None:
    assert recording(monkeypatch, ranks)._buffer.sizes == (2**30, rdma)
