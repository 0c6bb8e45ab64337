"""Threads of one process on a CPU, chosen before torch is loaded: as many as there are cores free for it.

torch takes a thread for every core, and libgomp's threads spin while they wait for each other: beside other programs
each waits for a thread that does not run, and a step takes many times as long. So waiting threads sleep
(OMP_WAIT_POLICY=passive, set in `__main__`), and there are as many as cores are free: of those of this process (its
affinity, its control group's quota) those that other programs do not keep busy. What the user set stays. Busy cores
are counted as the smaller of the mean load of the last minute, which may be a program's that has ended, and of the
programs that run just now, which may be a moment's. Refused: torch.set_num_threads, which comes after the first threads
have started and does not hold for MKL's own.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
LOADAVG = Path("/proc/loadavg")
CPU_MAX, CFS = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
SAMPLES, APART = 5, 0.01  # of the programs that run just now, seconds between them


def choose_threads(environ: MutableMapping[str, str]) -> str | None:
    """Set OMP_NUM_THREADS for a process of its own, unless it is set -> what to tell the user, None for nothing.

    Call it before torch is imported.
    """
    if THREADS in environ:
        return None
    cores, busy = usable_cores(), busy_cores()
    threads = max(1, min(cores, round((os.cpu_count() or 1) - busy)))
    environ[THREADS] = str(threads)
    if threads == cores:
        return None
    return (
        f"computes on {threads} thread{'s' if threads > 1 else ''}: this process may use {cores} cores, and other "
        f"programs keep {busy:.1f} of the machine's {os.cpu_count()} busy; {THREADS}={cores} takes all of its own"
    )


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, at most its control group's quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, quota())))


def quota() -> float:
    """CPU seconds a second that this process's control group may use, version 2 or 1; infinity without a limit."""
    with contextlib.suppress(OSError, ValueError):
        used, period = CPU_MAX.read_text().split()
        return math.inf if used == "max" else float(used) / float(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        used, period = ((CFS / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(used) / float(period) if float(used) > 0 else math.inf
    return math.inf


def busy_cores() -> float:
    """Cores that other programs keep busy; 0 where the system does not say."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return 0.0
    running = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _ in range(SAMPLES):
            running.append(int(LOADAVG.read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(APART)
    return min(load, statistics.median(running)) if running else load
