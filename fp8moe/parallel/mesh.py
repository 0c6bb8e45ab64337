"""Who talks to whom: world = pp x dp, dp = edp x ep, ep innermost.

Ranks that exchange tokens sit side by side, on one node where it fits. Dense parameters are replicated over `dp`,
expert parameters over `edp` (the ranks that hold the same experts). Every group carries the configured timeout: torch
gives groups 30 minutes whatever the world's is. The mesh is an argument to all that needs it, never a global.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.parallel.collectives import all_reduce, exchange


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def listed(numbers: list[int]) -> str:
    """'1, 2, 4 or 8'."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def validate_mesh(world_size: int, pp: int, ep: int, num_experts: int) -> None:
    """Raise ValueError unless pp divides the world, ep the data-parallel ranks, and ep the experts."""
    for name, size in (("pp", pp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size} must be at least 1")
    if world_size % pp:
        raise ValueError(f"parallel.pp={pp} does not divide {world_size} processes: use {listed(divisors(world_size))}")
    if num_experts % ep:
        raise ValueError(
            f"parallel.ep={ep} does not divide num_experts={num_experts}: use {listed(divisors(num_experts))}"
        )
    dp = world_size // pp
    if dp % ep:
        legal = [d for d in divisors(dp) if num_experts % d == 0]
        raise ValueError(f"parallel.ep={ep} does not divide the {dp} data-parallel processes: use {listed(legal)}")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's place on each, and the groups it belongs to (None where it is alone)."""

    pp: int
    dp: int
    ep: int
    rank: int
    dp_group: ProcessGroup | None = None
    ep_group: ProcessGroup | None = None
    edp_group: ProcessGroup | None = None
    rail_group: ProcessGroup | None = None
    node_group: ProcessGroup | None = None

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Every group that this rank belongs to, in one order on all ranks."""
        every = (self.dp_group, self.ep_group, self.edp_group, self.rail_group, self.node_group)
        return tuple(group for group in every if group is not None)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    @property
    def edp(self) -> int:
        return self.dp // self.ep

    @property
    def dp_rank(self) -> int:
        return self.rank % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.dp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.ep

    @property
    def edp_rank(self) -> int:
        return self.dp_rank // self.ep


def axis_ranks(pp: int, dp: int, ep: int, ranks_per_node: int | None = None) -> dict[str, list[list[int]]]:
    """The ranks of every group of every axis: dp (one pipeline stage), ep (neighbours), edp (same experts).

    With `ranks_per_node` each ep group also has its nodes (neighbours) and rails (one local index across its nodes).
    """
    stages = [list(range(stage * dp, (stage + 1) * dp)) for stage in range(pp)]
    experts = [stage[i : i + ep] for stage in stages for i in range(0, dp, ep)]
    axes = {"dp": stages, "ep": experts, "edp": [stage[i::ep] for stage in stages for i in range(ep)]}
    if ranks_per_node is not None:
        local = ranks_in_node(ep, ranks_per_node)
        axes["rail"] = [ranks[i::local] for ranks in experts for i in range(local)]
        axes["node"] = [ranks[i : i + local] for ranks in experts for i in range(0, ep, local)]
    return axes


def ranks_in_node(ep: int, ranks_per_node: int) -> int:
    """How many of an ep group's ranks share a node: all of a small group. ValueError where nodes cut unevenly."""
    if ranks_per_node < 1 or (ep > ranks_per_node and ep % ranks_per_node):
        raise ValueError(
            f"parallel.ranks_per_node={ranks_per_node} does not divide parallel.ep={ep}: use {listed(divisors(ep))}"
        )
    return min(ep, ranks_per_node)


def build_mesh(pp: int, dp: int, ep: int, *, timeout: timedelta, ranks_per_node: int | None = None) -> Mesh:
    """The mesh of this process. With more than one process torch.distributed must be up; collective over all ranks.

    `ranks_per_node` adds the groups of a two-hop dispatcher.
    """
    world = pp * dp
    if world == 1:
        return Mesh(pp, dp, ep, rank=0)
    if dist.get_world_size() != world:
        raise ValueError(f"the mesh pp={pp} x dp={dp} needs {world} processes, and there are {dist.get_world_size()}")
    rank = dist.get_rank()
    mine: dict[str, ProcessGroup] = {}
    for axis, groups in axis_ranks(pp, dp, ep, ranks_per_node).items():
        for number, ranks in enumerate(groups):
            if len(ranks) > 1:  # every rank must take part in making every group, in one order
                group = dist.new_group(ranks, timeout=timeout, group_desc=f"{axis}{number}")
                if rank in ranks:
                    mine[axis] = group
    return Mesh(pp, dp, ep, rank, *(mine.get(axis) for axis in ("dp", "ep", "edp", "rail", "node")))


def warm_up(mesh: Mesh, device: torch.device) -> None:
    """Let every group open its connections and back ends their buffers, before weights are allocated. Collective."""
    for group in mesh.groups:
        all_reduce(torch.zeros(1, device=device), group)
        exchange(torch.zeros(group.size(), 1, device=device), group, "warm-up")
