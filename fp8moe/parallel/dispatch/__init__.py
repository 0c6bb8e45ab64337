"""Dispatchers of rows to experts on other ranks, and how one is chosen by name."""

from __future__ import annotations

from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop, two_hops
from fp8moe.parallel.dispatch.counts import Capacity
from fp8moe.parallel.dispatch.deep_ep import DeepEPDispatcher
from fp8moe.parallel.mesh import Mesh


def make_dispatcher(
    name: str,
    mesh: Mesh,
    num_experts: int,
    *,
    max_tokens: int,
    chunks: int = 1,
    capacity_factor: float | None = None,
    max_imbalance: float | None = None,
) -> Dispatcher:
    """`name` all_to_all, node_limited or deep_ep, on the ep group of `mesh`; where that is one rank, none is needed.

    `max_tokens`: the most that one dispatch is given, which fixed messages (`capacity_factor`) are sized for.
    """
    if mesh.ep_group is None:
        return LocalDispatcher(num_experts)
    if name == "deep_ep":
        return DeepEPDispatcher(mesh.ep_group, num_experts)
    capacity = None if capacity_factor is None else Capacity(max_tokens, capacity_factor)
    if name == "node_limited":
        route = two_hops(mesh.ep_group, mesh.rail_group, mesh.node_group, num_experts)
    else:
        assert name == "all_to_all", name
        route = one_hop(mesh.ep_group, num_experts)
    return AllToAllDispatcher(*route, chunks=chunks, capacity=capacity, max_imbalance=max_imbalance)
