"""The examination: every check in order, on one process or on all ranks of a launcher, into one report.

What is found of a rank is gathered by rank 0. Each message has a time limit, and a rank that does not come, or ends in
between, is an error of one sentence that names it: such a report would be of a cluster that is not there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.doctor import gemm, gpu, host, network, storage, versions
from fp8moe.doctor.finding import Finding, Report, merged
from fp8moe.parallel import hang
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.place import remember, this_place
from fp8moe.train.processes import join, leave, own_device


def examine(world_size: int, run_dir: Path | None, seconds: float) -> Report | None:
    """The report, on rank 0; None on the others. Collective over all ranks.

    run_dir: where a run would write, or None. seconds: the time limit of meeting, and of each message. Raises
    RendezvousError, HangError.
    """
    device, timeout = own_device(), timedelta(seconds=seconds)
    if world_size == 1:
        return _examine(None, device, run_dir, timeout)
    join(device, timeout)
    hang.start()
    group = dist.new_group(timeout=timeout, group_desc="all ranks")
    report = _examine(group, device, run_dir, timeout)
    leave()
    return report


def _examine(
    group: ProcessGroup | None, device: torch.device, run_dir: Path | None, timeout: timedelta
) -> Report | None:
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    speaks, on_gpu = os.environ.get("LOCAL_RANK", "0") == "0", device.type == "cuda"
    places = gather(this_place(device.index), group)
    remember(places if group is not None else [])
    hosts = [one.host for one in places]
    mine = versions.versions()
    first = gather(mine, group)[0]
    capability = torch.cuda.get_device_capability(device) if on_gpu else None
    found: list[Finding] = [*versions.check_versions(mine), *versions.check_same(mine, first)]
    found += versions.check_kernels()
    if speaks:  # for its node
        of_node = [
            *gpu.check_gpus(torch.cuda.device_count()),
            *host.check_host(local, world_size, gpu=on_gpu),
        ]
        found += [replace(one, node=hosts[rank]) for one in of_node]
    found += gpu.check_fp8(capability)
    found += host.check_clock(group)
    if run_dir is not None:
        found += storage.check_run_dir(run_dir, group, looks=speaks)
    found += gemm.check_correct(device)
    speeds = gather(gemm.speeds(device), group)
    figures: dict[str, object] = {"versions": first, "hosts": hosts, "gemm_tflops": speeds}
    if rank == 0:
        found += gemm.check_speeds(speeds, hopper=capability == (9, 0))
    if group is not None:
        measured = network.measure(group, device, local, network.sizes_of(device), timeout)
        figures["network"] = measured
        if rank == 0:
            found += network.check_network(measured, hosts, local, device)
    of_ranks = gather(found, group)
    return merged(of_ranks, len(set(hosts)), figures) if rank == 0 else None
