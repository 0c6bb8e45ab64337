"""This machine beside its GPUs: free memory, shared memory, limits of a process, and its clock beside rank 0's."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import time
from pathlib import Path

from torch.distributed import ProcessGroup

from fp8moe.cuda_environment import MOST_QUEUES, QUEUES, few_queues
from fp8moe.doctor.finding import Finding, Level
from fp8moe.parallel.collectives import gather

PART = "host"
LEAST_MEMORY = 4e9  # bytes a process: torch, its libraries, the copy that a checkpoint is written from
LEAST_SHARED = 1e9  # bytes of /dev/shm where several processes use GPUs; containers begin with 64 MB
DESCRIPTORS = (512, 8)  # files that a process has open at once: these, and so many for each rank of the run
LOCKED = 1 << 26  # bytes that an InfiniBand card's buffers take at least
MOST_SKEW = 1.0  # seconds
ROUNDS = 5
INFINIBAND = Path("/sys/class/infiniband")
MEMORY, SHARED = Path("/proc/meminfo"), Path("/dev/shm")


def check_host(local_processes: int, world_size: int, *, gpu: bool) -> list[Finding]:
    """Lines on memory, shared memory and limits. local_processes: ranks of the run on this machine."""
    queues = _queues() if gpu and world_size > 1 else []
    return [*_memory(local_processes), *_shared_memory(local_processes, gpu), *_limits(world_size, gpu), *queues]


def _queues() -> list[Finding]:
    """Whether messages can travel beside compute, by what the environment gives CUDA."""
    few = few_queues(os.environ)
    if few is None:
        return []
    return [Finding(PART, few, Level.ADVICE, f"unset {QUEUES}: fp8moe then takes {MOST_QUEUES}")]


def _memory(local_processes: int) -> list[Finding]:
    free = available_bytes()
    if free is None:
        return []
    text = f"{os.cpu_count()} cores, {free / 1e9:.3g} GB of memory free"
    if free >= LEAST_MEMORY * local_processes:
        return [Finding(PART, text)]
    fix = f"free memory, or start fewer processes here: {local_processes} need about {LEAST_MEMORY / 1e9:g} GB each"
    return [Finding(PART, text, Level.ADVICE, fix)]


def available_bytes() -> int | None:
    """Bytes that programs could still take; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = MEMORY.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return None


def _shared_memory(local_processes: int, gpu: bool) -> list[Finding]:
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return []
    size = status.f_frsize * status.f_blocks
    text = f"{SHARED} has {size / 1e9:.3g} GB"
    if not gpu or local_processes == 1 or size >= LEAST_SHARED:
        return [Finding(PART, text)]
    fix = f"give it {LEAST_SHARED / 1e9:g} GB or more: NCCL's processes share it (`docker run --shm-size=8g`)"
    return [Finding(PART, text, Level.STOP, fix)]


def _limits(world_size: int, gpu: bool) -> list[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    words = f"{_words(files)} open files, {_words(locked)} bytes of locked memory, core files of {_words(core)} bytes"
    found = [Finding(PART, f"limits: {words}")]
    needed = DESCRIPTORS[0] + DESCRIPTORS[1] * world_size
    if 0 <= files < needed:
        fix = f"raise the limit of open files to {needed} or more for {world_size} ranks (`ulimit -n 65536`)"
        found.append(Finding(PART, f"a process may open {files} files", Level.STOP, fix))
    if gpu and INFINIBAND.is_dir() and 0 <= locked < LOCKED:
        fix = "lift the limit of locked memory for InfiniBand (`ulimit -l unlimited`, `docker run --ulimit memlock=-1`)"
        found.append(Finding(PART, f"a process may lock {locked} bytes of memory", Level.STOP, fix))
    return found


def _words(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else str(limit)


def check_clock(group: ProcessGroup | None) -> list[Finding]:
    """How far this machine's clock is from rank 0's, by messages that end together. Collective over `group`."""
    if group is None:
        return []
    readings = []
    for _ in range(ROUNDS):
        gather(None, group)
        readings.append(time.time())
    first = gather(readings, group)[0]
    skew = statistics.median(mine - theirs for mine, theirs in zip(readings, first, strict=True))
    if abs(skew) <= MOST_SKEW:
        return [Finding(PART, f"clocks of all ranks agree within {MOST_SKEW:g} s")]
    text = f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of rank 0"
    fix = (
        "set the clock (`chronyc makestep`, or start chronyd): logs can't be compared, and signed requests are refused"
    )
    return [Finding(PART, text, Level.ADVICE, fix)]
