"""Bandwidth and latency of collectives by group size, and of pairs of ranks; the odd node or rank by them.

Groups are consecutive ranks, as the `ep` axis of the mesh has them: of 2, 4, 8, ..., of a node, of all. All groups of
one size run at once, as in training, and so share the network. Bandwidth is that of one rank in one direction: an
all-reduce moves 2 (W-1)/W of its bytes, an all-to-all (W-1)/W. Times are medians of repeated calls on the host's clock,
behind a barrier; on a GPU the device is waited for.

Who is slow can't be told from collectives, which are as slow for all. Ranks therefore meet in pairs, in rounds in which
everyone has another partner (the circle method of tournaments), and a rank's speed is the median over its rounds, of
the fastest call of each: a slow rank is slow in all of its rounds, any other in one, and a busy host now and then.
Every message is of `parallel.collectives`, with a time limit, so a rank that has died is named by the hang detector.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.doctor.finding import Finding, Level
from fp8moe.doctor.host import INFINIBAND
from fp8moe.doctor.odd import odd_places
from fp8moe.parallel.collectives import all_reduce, gather, start_all_to_all
from fp8moe.parallel.place import rank_in_words

PART = "network"
MOST_ROUNDS = 8
WARM_UP = 2
NVLINK_LEAST, NETWORK_LEAST = 60.0, 5.0  # GB/s of a rank's all-to-all: below, NVLink or InfiniBand is not what is used


@dataclass(frozen=True)
class Sizes:
    """What is sent: bytes of a message of each rank, and how often each call is repeated."""

    message: int
    repeats: int


def sizes_of(device: torch.device) -> Sizes:
    """64 MiB on a GPU, 4 MiB between processes of a CPU."""
    return Sizes(1 << 26, 10) if device.type == "cuda" else Sizes(1 << 22, 5)


def group_sizes(world_size: int, local: int) -> list[int]:
    """2, 4, 8, ..., a node's and all ranks, those that divide the world."""
    powers = {1 << i for i in range(1, world_size.bit_length())}
    return sorted(size for size in {*powers, local, world_size} if size > 1 and world_size % size == 0)


def partner(rank: int, number: int, world_size: int) -> int | None:
    """Whom `rank` meets in round `number`, of world_size - 1 (world_size, if odd: one rank rests, None)."""
    last = world_size - 1 + world_size % 2
    if rank == last:
        return number % last
    other = (2 * number - rank) % last
    if other == rank:
        other = last
    return other if other < world_size else None


def measure(group: ProcessGroup, device: torch.device, local: int, sizes: Sizes, timeout: timedelta) -> dict[str, Any]:
    """Figures of every group size, and each rank's speed in pairs in GB/s. Collective over `group`, of all ranks."""
    world_size, rank = group.size(), group.rank()
    found: list[dict[str, Any]] = []
    for size in group_sizes(world_size, local):
        mine = group
        if size < world_size:
            first = rank - rank % size
            ranks = list(range(first, first + size))
            name = f"ranks {first} to {first + size - 1}"
            mine = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True, group_desc=name)
        found.append({"ranks": size, **_of_groups(mine, group, device, sizes)})
    return {"groups": found, "pairs": gather(_in_pairs(group, device, sizes), group)}


def _of_groups(mine: ProcessGroup, everyone: ProcessGroup, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Figures of one size: of the median group, and the slowest group's bandwidth of an all-to-all."""
    size = mine.size()
    data = torch.zeros(sizes.message, dtype=torch.uint8, device=device)
    floats = data.view(torch.float32)
    one = torch.zeros(1, device=device)
    rows = torch.zeros(size, sizes.message // size, dtype=torch.uint8, device=device)
    ones = [1] * size
    calls: dict[str, Callable[[], object]] = {
        "latency": lambda: all_reduce(one, mine),
        "all_reduce": lambda: all_reduce(floats, mine),
        "all_to_all": lambda: start_all_to_all(rows, ones, ones, mine, "doctor").wait(),
    }
    times = {name: statistics.median(_times(call, mine, device, sizes.repeats)) for name, call in calls.items()}
    share = (size - 1) / size
    figures = {
        "all_reduce_gb_per_second": 2 * share * sizes.message / times["all_reduce"] / 1e9,
        "all_to_all_gb_per_second": share * sizes.message / times["all_to_all"] / 1e9,
        "latency_microseconds": times["latency"] * 1e6,
    }
    of_ranks = gather(figures, everyone)
    middle = {name: statistics.median(one[name] for one in of_ranks) for name in figures}
    return middle | {"slowest_all_to_all_gb_per_second": min(one["all_to_all_gb_per_second"] for one in of_ranks)}


def _in_pairs(group: ProcessGroup, device: torch.device, sizes: Sizes) -> float:
    """This rank's speed, GB/s in one direction: the median over rounds of another partner each."""
    world_size, rank = group.size(), group.rank()
    count = world_size - 1 + world_size % 2
    speeds = []
    for number in sorted({i * count // MOST_ROUNDS for i in range(MOST_ROUNDS)}):
        other = partner(rank, number, world_size)
        lengths = [1 if peer == other else 0 for peer in range(world_size)]
        rows = torch.zeros(sum(lengths), sizes.message, dtype=torch.uint8, device=device)

        def call(rows: torch.Tensor = rows, lengths: list[int] = lengths) -> object:
            return start_all_to_all(rows, lengths, lengths, group, "doctor, in pairs").wait()

        seconds = min(_times(call, group, device, sizes.repeats))
        if other is not None:
            speeds.append(sizes.message / seconds / 1e9)
    return statistics.median(speeds)


def _times(call: Callable[[], object], group: ProcessGroup, device: torch.device, repeats: int) -> list[float]:
    """Seconds of calls, each of which all ranks of `group` begin together."""
    times = []
    barrier = torch.zeros(1, device=device)
    for number in range(WARM_UP + repeats):
        all_reduce(barrier, group)
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_network(figures: dict[str, Any], hosts: list[str], local: int, device: torch.device) -> list[Finding]:
    """Lines of the figures, the odd ones, and a network that is not what it should be. For rank 0 to say."""
    lines = [
        Finding(
            PART,
            f"{one['ranks']} ranks: all-reduce {one['all_reduce_gb_per_second']:.3g} GB/s, all-to-all "
            f"{one['all_to_all_gb_per_second']:.3g} GB/s (slowest rank {one['slowest_all_to_all_gb_per_second']:.3g}), "
            f"latency {one['latency_microseconds']:.0f} us",
        )
        for one in figures["groups"]
    ]
    pairs = figures["pairs"]
    middle = statistics.median(pairs)
    lines.append(Finding(PART, f"pairs: {middle:.3g} GB/s a rank in the median, {min(pairs):.3g} the slowest"))
    nodes, ranks = odd_places(pairs, hosts)
    named = [*((f"node {host}", share) for host, share in nodes.items())]
    named += [(rank_in_words(rank), share) for rank, share in ranks.items()]
    for name, share in named:
        fix = (
            f"leave {name} out, or have its links looked at (`ibstat`, `nvidia-smi nvlink --status`, `ethtool DEVICE`)"
        )
        text = f"{name} is odd: its messages in pairs have {100 * share:.0f} % of the others' speed"
        lines.append(Finding(PART, text, Level.ADVICE, fix))
    return [*lines, *_slow(figures["groups"], hosts, local, device)]


def _slow(groups: list[dict[str, Any]], hosts: list[str], local: int, device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        return []
    found = []
    speeds = {one["ranks"]: one["all_to_all_gb_per_second"] for one in groups}
    if 1 < local in speeds and speeds[local] < NVLINK_LEAST:
        fix = "see `nvidia-smi topo -m` and `nvidia-smi nvlink --status`; unset NCCL_P2P_DISABLE"
        text = f"{speeds[local]:.3g} GB/s within a node: NVLink, which gives {NVLINK_LEAST:g} and more, is not used"
        found.append(Finding(PART, text, Level.ADVICE, fix))
    if len(set(hosts)) > 1 and INFINIBAND.is_dir() and speeds[len(hosts)] < NETWORK_LEAST:
        fix = "see what NCCL uses with NCCL_DEBUG=INFO; unset NCCL_IB_DISABLE, set NCCL_IB_HCA to the cards of `ibstat`"
        text = f"{speeds[len(hosts)]:.3g} GB/s between nodes that have InfiniBand: it is not used, or not by every GPU"
        found.append(Finding(PART, text, Level.ADVICE, fix))
    return found
