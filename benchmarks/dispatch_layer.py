"""One rank's share of a dispatch benchmark: its batch, its dispatchers, and the exchanges that are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.dispatch_traffic import Naive, Setting, Traffic, routing
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.parallel.collectives import all_reduce, sent_bytes
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import Mesh, build_mesh, warm_up

VERBS = ("dispatch", "combine", "combine backward", "dispatch backward")
KINDS = {"one hop": "all_to_all", "two hops": "node_limited"}
TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class VerbCost:
    """Cost of one verb on one rank, waited for at once: its time, and the payload that the rank sent."""

    seconds: float
    sent: Traffic


class Layer:
    """One rank's batch and dispatchers, and the exchanges that are measured."""

    def __init__(self, setting: Setting, mesh: Mesh) -> None:
        self.setting, self.mesh = setting, mesh
        assert mesh.ep_group is not None
        self.all_ids = [routing(setting, seed) for seed in range(setting.ranks)]
        self.ids = self.all_ids[mesh.rank]
        generator = torch.Generator().manual_seed(mesh.rank)
        self.x = torch.randn(setting.tokens, setting.hidden, generator=generator).bfloat16()
        self.rows = quantize_rows(self.x, power_of_two=True)
        self.weights = torch.rand(setting.tokens, setting.topk, generator=generator)
        self.naive = Naive(mesh.ep_group, setting.experts)
        self.dispatchers: dict[str, Dispatcher] = {
            kind: make_dispatcher(name, mesh, setting.experts, max_tokens=setting.tokens, chunks=setting.chunks)
            for kind, name in KINDS.items()
        }

    def forward(self, kind: str) -> None:
        """Dispatch and combine, waited for at once."""
        if kind == "naive":
            got, state = self.naive.dispatch(self.x, self.ids)
            self.naive.combine(got, state)
            return
        self.overlapped(kind, lambda _: None)

    def overlapped(self, kind: str, compute: Callable[[int], None]) -> None:
        """Dispatch and combine, with `compute(0)` and `compute(1)` between their starts and waits."""
        dispatcher = self.dispatchers[kind]
        message = dispatcher.dispatch(self.rows, dispatcher.announce(self.ids), self.weights)
        compute(0)
        arrived = message.wait()
        y_RD = arrived.weights_R.new_ones(1, dtype=torch.bfloat16).expand(len(arrived.weights_R), self.setting.hidden)
        summed = dispatcher.combine(y_RD, arrived.state)
        compute(1)
        summed.wait()

    def verbs(self, kind: str) -> dict[str, VerbCost]:
        """Each verb, waited for at once."""
        costs: dict[str, VerbCost] = {}

        def timed(name: str, run: Callable[[], Any]) -> Any:
            dist.barrier()
            self.sent()
            begin = time.perf_counter()
            value = run()
            costs[name] = VerbCost(time.perf_counter() - begin, self.sent())
            return value

        if kind == "naive":
            self._naive_verbs(timed)
        else:
            self._verbs(self.dispatchers[kind], lambda name, start: timed(name, lambda: start().wait()))
        return costs

    def _naive_verbs(self, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
        copies_ND, state = timed("dispatch", lambda: self.naive.dispatch(self.x, self.ids))
        timed("combine", lambda: self.naive.combine(copies_ND, state))
        timed("combine backward", lambda: self.naive.copies(self.x, state))
        timed("dispatch backward", lambda: self.naive.combine(copies_ND, state))

    def _verbs(self, d: Dispatcher, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
        arrived = timed("dispatch", lambda: d.dispatch(self.rows, d.announce(self.ids), self.weights))
        y_RD = torch.ones(len(arrived.weights_R), self.setting.hidden, dtype=torch.bfloat16)
        timed("combine", lambda: d.combine(y_RD, arrived.state))
        timed("combine backward", lambda: d.combine_backward(self.x, arrived.state, fp8=True))
        timed("dispatch backward", lambda: d.dispatch_backward(y_RD, arrived.weights_R, arrived.state))

    def counted(self) -> Traffic:
        """Bytes that all ranks handed to collectives since the last call, across nodes and inside them."""
        mine = self.sent()
        return Traffic(*all_reduce(torch.tensor([mine.across, mine.inside]), self.mesh.dp_group).tolist())

    def sent(self) -> Traffic:
        """Bytes that this rank handed to collectives since the last call."""
        across = inside = 0
        for (group, peer), num_bytes in sent_bytes().items():
            if group.startswith("rail") or (
                group.startswith("ep") and peer // self.setting.per_node != self.mesh.rank // self.setting.per_node
            ):
                across += num_bytes
            else:
                inside += num_bytes
        return Traffic(across, inside)


def ranks_of(setting: Setting) -> Mesh:
    """The mesh of the running process group, its groups warmed up."""
    mesh = build_mesh(1, setting.ranks, setting.ranks, timeout=TIMEOUT, ranks_per_node=setting.per_node)
    warm_up(mesh, torch.device("cpu"))
    return mesh
