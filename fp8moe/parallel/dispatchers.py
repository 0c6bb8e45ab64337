"""The dispatcher of a run, by name."""

from __future__ import annotations

from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.parallel.counts import Capacity
from fp8moe.parallel.deep_ep import DeepEPDispatcher
from fp8moe.parallel.expert_parallel import AllToAllDispatcher
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.node_limited import NodeLimitedDispatcher


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
        return NodeLimitedDispatcher(
            mesh.ep_group, mesh.rail_group, mesh.node_group, num_experts,
            chunks=chunks, capacity=capacity, max_imbalance=max_imbalance,
        )  # fmt: skip
    assert name == "all_to_all", name
    return AllToAllDispatcher(mesh.ep_group, num_experts, chunks=chunks, capacity=capacity, max_imbalance=max_imbalance)
