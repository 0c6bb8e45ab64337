"""Processes of a run: this rank's device, its process groups and their time limits, the run directory they share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fp8moe.errors import PreemptedError
from fp8moe.parallel import hang
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh, build_mesh, warm_up
from fp8moe.parallel.place import remember, this_place
from fp8moe.train.config import TrainConfig, is_tied
from fp8moe.train.rendezvous import connecting, meet
from fp8moe.train.run_dir import PREEMPTED, claim, make_run_dir, mark_preempted
from fp8moe.train.run_lock import release
from fp8moe.train.shared_dir import check_shared

WRITING_TIMEOUT = timedelta(minutes=30)  # the slowest rank's share of a checkpoint, on the slowest storage
REPORT_AFTER = 0.8  # share of the timeout after which a collective that has not ended is reported


def choose_device(config: TrainConfig) -> torch.device:
    """This rank's device: its own GPU, by LOCAL_RANK, or the CPU."""
    return torch.device("cpu") if config.device == "cpu" else own_device()


def own_device() -> torch.device:
    """The GPU of LOCAL_RANK, made the current one; the CPU where torch sees none. ValueError: too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"LOCAL_RANK={local} needs {local + 1} GPUs on this machine, one a process, and torch sees {count}: start "
            f"{count} processes"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def processes(config: TrainConfig, device: torch.device) -> Iterator[Mesh]:
    """The mesh, whose process groups exist while the block runs. A world of one starts none and opens no port."""
    parallel = config.parallel
    timeout = timedelta(seconds=parallel.startup_timeout)
    if parallel.pp * config.dp == 1:
        yield build_mesh(1, 1, 1, timeout=timeout)
        return
    join(device, timeout)
    mesh = mesh_of(config, device)
    hang.start()
    remember(gather(this_place(device.index), mesh.world_group))
    warm_up(mesh, device)
    Links(mesh, timeout).warm_up(device)
    yield mesh
    leave()


def join(device: torch.device, timeout: timedelta) -> None:
    """Meet the other ranks and make the first group of all. Raises RendezvousError."""
    record_nccl()
    # Both back ends, so that host-side objects (checkpoints, the run directory's name) never go through the GPU.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    store, here = meet(timeout)
    with connecting(here, nccl=device.type == "cuda"):
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=timeout)


def leave() -> None:
    """End what `join` and the hang detector began; not after an error: it would wait for peers, and the process ends
    anyway."""
    hang.stop()
    remember([])
    dist.destroy_process_group()


def mesh_of(config: TrainConfig, device: torch.device) -> Mesh:
    """The mesh of a resolved configuration; its groups wait as long as start-up may take. Collective over all ranks."""
    parallel = config.parallel
    return build_mesh(
        parallel.pp,
        config.dp,
        config.ep,
        timeout=timedelta(seconds=parallel.startup_timeout),
        ranks_per_node=parallel.ranks_per_node if parallel.dispatcher == "node_limited" else None,
        mirrored=parallel.schedule == "dualpipe",
        nccl_ctas=parallel.communication_sms if device.type == "cuda" else None,
        tied=is_tied(config),
        cp=parallel.cp,
    )


def record_nccl() -> None:
    """Have NCCL record its last collectives and write them to a file on a timeout, unless the user set otherwise."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def wait_for_all(mesh: Mesh) -> None:
    """A barrier on the host over all ranks."""
    float(all_reduce(torch.zeros(1), mesh.world_group))


def writing_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """A group of all ranks on the host, for checkpoints that are written beside the training. Collective."""
    if mesh.world_group is None:
        return None
    return dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT)


def claim_run_dir(config: TrainConfig, mesh: Mesh) -> Path:
    """The run directory, made and locked by rank 0; an error there is raised on all ranks. Collective over all ranks.

    A worker that torchrun's agent has started again after a preemption ends as the one before: the agent does not know
    why that one ended.
    """
    answer: list[Path | Exception | None] = [None]
    if mesh.rank == 0:
        try:
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            if restarted and config.run_dir is not None and (Path(config.run_dir) / PREEMPTED).exists():
                raise PreemptedError(f"{config.run_dir} was preempted: it is not started again in this allocation")
            run_dir = make_run_dir(config.run_dir, config.name, config.resume)
            claim(run_dir, config.resume)
            answer[0] = run_dir
        except (ValueError, OSError, PreemptedError) as error:
            answer[0] = error
    if mesh.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], OSError):
        raise ValueError(f"run_dir={config.run_dir} cannot be made ({answer[0].strerror}): use another run_dir")
    if isinstance(answer[0], Exception):
        raise answer[0]
    assert answer[0] is not None
    try:
        check_shared(answer[0], mesh)
    except BaseException:
        release(answer[0])
        raise
    return answer[0]


def release_run_dir(run_dir: Path, mesh: Mesh, error: Exception) -> None:
    """What rank 0 leaves in the run directory when a signal ends the run, by what that gave; its lock is removed."""
    if mesh.rank == 0:
        if isinstance(error, PreemptedError):
            mark_preempted(run_dir, str(error))
        release(run_dir)


def end_startup(mesh: Mesh, links: Links, seconds: float) -> None:
    """End start-up: from here on a message that takes longer than `seconds` (`parallel.timeout`) is a hang."""
    timeout = timedelta(seconds=seconds)
    hang.report_after(REPORT_AFTER * seconds)
    for group in mesh.groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    links.timeout = timeout
