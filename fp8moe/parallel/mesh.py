"""Process mesh: world = pp x dp, dp = edp x ep, ep innermost; the process groups that a rank belongs to.

Ranks that exchange tokens sit side by side, on one node where it fits. Dense parameters are replicated over `dp`,
expert parameters over `edp` (the ranks that hold the same experts). Context parallelism divides edp: cp ranks of one
ep rank share sequences, each a part of every one, so dp / cp ranks read data of their own. Every group carries the
configured timeout: torch gives groups 30 minutes whatever the world's is. The mesh is an argument to all that needs it,
never a global.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.parallel.collectives import all_reduce, exchange

LAYER_AXES = ("ep", "rail", "node", "cp")  # whose groups carry the messages of layers
REPLICA_AXES = ("dense", "expert")  # gradients and weights, beside compute as well


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def listed(numbers: list[int]) -> str:
    """'1, 2, 4 or 8'."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def validate_mesh(world_size: int, pp: int, ep: int, num_experts: int, *, cp: int = 1) -> None:
    """Raise ValueError unless pp divides the world, cp x ep the data-parallel ranks, and ep the experts."""
    for name, size in (("pp", pp), ("ep", ep), ("cp", cp)):
        if size < 1:
            raise ValueError(f"parallel.{name}={size} must be at least 1: use 1 or more")
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
    if dp // ep % cp:
        of_ep = "" if ep == 1 else f" / parallel.ep = {dp} / {ep}"
        raise ValueError(
            f"parallel.cp={cp} does not divide the {dp} data-parallel processes{of_ep}: "
            f"use {listed(divisors(dp // ep))}"
        )


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's place on each, and the groups it belongs to (None where it is alone).

    dense_group, expert_group   ranks with the same dense, and the same expert, parameters: dp and edp, or in a mirrored
                                pipeline those of both ranks of a stage. For gradients and weights alone, whose messages
                                run beside all others
    pp_group                    the pipeline: ranks of one dp rank, every stage
    tie_group                   the first and the last stage's rank, where the last holds a copy of the embedding
    up_group, down_group        the pipeline again: messages to the next rank, and to the one before
    cp_group                    the ranks that hold parts of the same sequences
    """

    pp: int
    dp: int
    ep: int
    rank: int
    mirrored: bool = False
    cp: int = 1
    world_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    ep_group: ProcessGroup | None = None
    dense_group: ProcessGroup | None = None
    expert_group: ProcessGroup | None = None
    pp_group: ProcessGroup | None = None
    up_group: ProcessGroup | None = None
    down_group: ProcessGroup | None = None
    tie_group: ProcessGroup | None = None
    rail_group: ProcessGroup | None = None
    node_group: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Every group of collectives that this rank belongs to, in one order on all ranks, each once."""
        every = (
            self.world_group, self.dp_group, self.ep_group, self.dense_group, self.expert_group,
            self.pp_group, self.up_group, self.down_group, self.tie_group, self.rail_group, self.node_group,
            self.cp_group,
        )  # fmt: skip
        return tuple(dict.fromkeys(group for group in every if group is not None))

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

    @property
    def cp_rank(self) -> int:
        """Which part of its sequences this rank holds."""
        return self.edp_rank % self.cp

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks, or groups of cp of them, that read sequences of their own."""
        return self.dp // self.cp

    @property
    def data_rank(self) -> int:
        """Which of them this rank is, or belongs to."""
        return self.edp_rank // self.cp * self.ep + self.ep_rank

    @property
    def replicas(self) -> list[int]:
        """The pipeline ranks that hold this rank's stages: itself, and its mirror image in a mirrored pipeline."""
        return sorted({self.pp_rank, self.pp - 1 - self.pp_rank}) if self.mirrored else [self.pp_rank]

    @property
    def is_counted(self) -> bool:
        """Whether this rank's parameters count, of those pipeline ranks that hold the same."""
        return self.pp_rank == self.replicas[0]


def axis_ranks(
    pp: int,
    dp: int,
    ep: int,
    ranks_per_node: int | None = None,
    *,
    mirrored: bool = False,
    tied: bool = False,
    cp: int = 1,
) -> dict[str, list[list[int]]]:
    """The ranks of every group of every axis, by the names of `Mesh`'s groups.

    dp (one pipeline rank), ep (neighbours), dense (dp again) and expert (same experts), the last two of both pipeline
    ranks of a stage where `mirrored`; with more than one pipeline rank world, pp, up, down and, where `tied`, tie
    (first and last). With `cp` parts of a sequence cp (one ep rank of cp neighbouring groups of experts). With
    `ranks_per_node` each ep group also has its nodes (neighbours) and rails (one local index
    across its nodes).
    """
    stages = [list(range(stage * dp, (stage + 1) * dp)) for stage in range(pp)]
    experts = [stage[i : i + ep] for stage in stages for i in range(0, dp, ep)]
    axes = {"dp": stages, "ep": experts}
    if ranks_per_node is not None:
        local = ranks_in_node(ep, ranks_per_node)
        axes["rail"] = [ranks[i::local] for ranks in experts for i in range(local)]
        axes["node"] = [ranks[i : i + local] for ranks in experts for i in range(0, ep, local)]
    if cp > 1:
        size = cp * ep
        axes["cp"] = [stage[i + j : i + size : ep] for stage in stages for i in range(0, dp, size) for j in range(ep)]
    if pp > 1:
        axes["world"] = [list(range(pp * dp))]
        axes["pp"] = axes["up"] = axes["down"] = [list(range(rank, pp * dp, dp)) for rank in range(dp)]
    axes["dense"] = [stages[rank] + stages[pp - 1 - rank] for rank in range(pp // 2)] if mirrored else stages
    axes["expert"] = [ranks[i::ep] for ranks in axes["dense"] for i in range(ep)]
    if tied:
        axes["tie"] = [[first, last] for first, last in zip(stages[0], stages[-1], strict=True)]
    return axes


def ranks_in_node(ep: int, ranks_per_node: int) -> int:
    """How many of an ep group's ranks share a node: all of a small group. ValueError where nodes cut unevenly."""
    if ranks_per_node < 1 or (ep > ranks_per_node and ep % ranks_per_node):
        raise ValueError(
            f"parallel.ranks_per_node={ranks_per_node} does not divide parallel.ep={ep}: use {listed(divisors(ep))}"
        )
    return min(ep, ranks_per_node)


def build_mesh(
    pp: int,
    dp: int,
    ep: int,
    *,
    timeout: timedelta,
    ranks_per_node: int | None = None,
    mirrored: bool = False,
    tied: bool = False,
    nccl_ctas: int | None = None,
    cp: int = 1,
) -> Mesh:
    """The mesh of this process. With more than one process torch.distributed must be up; collective over all ranks.

    `ranks_per_node` adds the groups of a two-hop dispatcher; `mirrored`, `tied` and `cp` are those of `axis_ranks`;
    `nccl_ctas` bounds the SMs that NCCL takes for messages beside compute (None: as NCCL likes, and without NCCL).
    """
    world = pp * dp
    if world == 1:
        return Mesh(pp, dp, ep, rank=0)
    if dist.get_world_size() != world:
        raise ValueError(
            f"the mesh pp={pp} x dp={dp} needs {world} processes, and there are {dist.get_world_size()}: start {world}"
        )
    rank = dist.get_rank()
    mine: dict[str, ProcessGroup] = {}
    for axis, groups in axis_ranks(pp, dp, ep, ranks_per_node, mirrored=mirrored, tied=tied, cp=cp).items():
        for number, ranks in enumerate(groups):
            if len(ranks) > 1:  # every rank must take part in making every group, in one order
                options = None if nccl_ctas is None else nccl_options(axis, nccl_ctas)
                group = dist.new_group(ranks, timeout=timeout, group_desc=f"{axis}{number}", pg_options=options)
                if rank in ranks:
                    mine[axis] = group
    axes = ("world", "dp", "ep", "dense", "expert", "pp", "up", "down", "tie", "rail", "node", "cp")
    found = {f"{axis}_group": mine.get(axis, mine.get("dp") if axis == "world" else None) for axis in axes}
    return Mesh(pp, dp, ep, rank, mirrored, cp, **found)


def nccl_options(axis: str, max_ctas: int) -> Any:
    """Options of an NCCL group whose messages travel beside compute; None for the groups of other axes.

    It takes at most `max_ctas` SMs, which GEMMs leave free, wherever these are: on Hopper NCCL's programs come in
    clusters of 4, which want as many free SMs side by side. Messages of layers take an SM that becomes free before
    compute does.
    """
    if axis not in (*LAYER_AXES, *REPLICA_AXES):
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = axis in LAYER_AXES
    options.config.max_ctas, options.config.cga_cluster_size = max_ctas, 1
    return options


def warm_up(mesh: Mesh, device: torch.device) -> None:
    """Open the connections that steps use and their buffers, before weights are allocated. Collective.

    All-to-alls are those of experts and of context parallelism alone: in other groups their connections would take
    memory for nothing. `Links` opens the pipeline's; beside a world, dp's messages are the host's.
    """
    idle = {mesh.up_group, mesh.down_group, None if mesh.dp_group is mesh.world_group else mesh.dp_group}
    with_exchange = {mesh.ep_group, mesh.rail_group, mesh.node_group, mesh.cp_group}
    for group in mesh.groups:
        if group in idle:
            continue
        all_reduce(torch.zeros(1, device=device), group)
        if group in with_exchange:
            exchange(torch.zeros(group.size(), 1, device=device), group, "warm-up")
