"""A function on several ranks of this machine: processes forked here, one thread each, joined by gloo over loopback."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(function: Callable[[], Any], world_size: int, timeout: timedelta) -> Any:
    """What `function` returns on rank 0; every rank calls it inside the default process group.

    Raises RuntimeError with the message of the first rank that fails.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, timeout, folder, queue))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        result, failure = queue.get()
        for process in ranks:
            process.join()
    if failure is not None:
        raise RuntimeError(failure)
    return result


def _rank(function: Callable[[], Any], rank: int, world_size: int, timeout: timedelta, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        result = function()
        dist.barrier()
    except Exception as error:  # the first rank to fail tells the parent, which would wait forever otherwise
        queue.put((None, f"rank {rank}: {error}"))
        os._exit(1)
    if rank == 0:
        queue.put((result, None))
    os._exit(0)
