"""A dispatcher between ranks without the other ranks: its messages have their sizes, arrive at once and hold nothing.

For what does not depend on a message's values: launches, bytes, memory, and the time of the host. The verbs of
`AllToAllDispatcher` run as they are; all-to-all gives back memory of the size that would have come. Counts are those
of fixed messages, since exact ones would have to be true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fp8moe.kernels.quantize import quantize_rows
from fp8moe.parallel.dispatch import all_to_all, counts, hops
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher
from fp8moe.parallel.dispatch.counts import Capacity, EpTopology
from fp8moe.parallel.dispatch.hops import HopGroup

RANKS, PER_NODE, FACTOR = 8, 4, 1.5


class Arrived:
    """A message that the communication stream has run."""

    def __init__(self, value: Any, finish: Callable[[Any], Any]) -> None:
        self._value, self._finish = value, finish

    def arrived(self) -> Any:
        return self._value

    def wait(self) -> Any:
        return self._finish(self._value)


def at_once(message: Callable[[], Any], finish: Callable[[Any], Any], name: str = "message", **_: Any) -> Arrived:
    """In place of the communication stream's `start`: the message in the thread that starts it."""
    return Arrived(message(), finish)


@contextmanager
def unsent_messages(start: Callable[..., Arrived] = at_once) -> Iterator[None]:
    """Within the block messages are not sent. start: runs what the communication stream would."""

    def start_all_to_all(rows: Tensor, send: list[int], receive: list[int], *rest: Any) -> Any:
        out = rows.contiguous().new_empty(sum(receive), *rows.shape[1:])
        return SimpleNamespace(wait=lambda: out)

    stream = SimpleNamespace(start=start)
    with ExitStack() as stack:
        for module, name, replacement in (
            (all_to_all, "communication_stream", lambda device: stream),
            (hops, "start_all_to_all", start_all_to_all),
            (counts, "exchange", lambda send, *rest: send.contiguous().clone()),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def _group(size: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: 1)


def one_hop(num_experts: int) -> tuple[EpTopology, tuple[HopGroup, ...]]:
    """Rank 1 of RANKS, which reach one another directly."""
    topology = EpTopology(_group(RANKS), num_experts, nodes=RANKS, ranks_per_node=1)
    return topology, (HopGroup(topology.group, topology.local_experts),)


def two_hops(num_experts: int) -> tuple[EpTopology, tuple[HopGroup, ...]]:
    """Rank 1 of RANKS on nodes of PER_NODE."""
    topology = EpTopology(_group(RANKS), num_experts, nodes=RANKS // PER_NODE, ranks_per_node=PER_NODE)
    e = topology.local_experts
    return topology, (HopGroup(_group(RANKS // PER_NODE), PER_NODE * e), HopGroup(_group(PER_NODE), e))


class FourMessages:
    """A dispatch of fixed size, its combine and their backwards, of `tokens` tokens of width `dim`."""

    def __init__(
        self, route: tuple[EpTopology, tuple[HopGroup, ...]], tokens: int, dim: int, topk: int, device: torch.device, *,
        fp8: bool,
    ) -> None:  # fmt: skip
        self._dispatcher, self._fp8 = AllToAllDispatcher(*route, capacity=Capacity(tokens, FACTOR)), fp8
        x = torch.zeros(tokens, dim, dtype=torch.bfloat16, device=device)
        self._x, self._rows = x, quantize_rows(x, power_of_two=True) if fp8 else x
        self._ids = torch.arange(tokens * topk, device=device).view(tokens, topk) % route[0].num_experts
        self._weights = torch.zeros(tokens, topk, device=device)

    def __call__(self) -> None:
        d = self._dispatcher
        arrived = d.dispatch(self._rows, d.announce(self._ids), self._weights).wait()
        y = self._x.new_empty(arrived.rows_RD.shape)
        d.combine(y, arrived.state).wait()
        d.combine_backward(self._x, arrived.state, fp8=self._fp8).wait()
        d.dispatch_backward(y, arrived.weights_R, arrived.state).wait()
