"""Where each rank runs: its host and its GPU, named in messages beside the rank; and what tells a process from others.

    ranks on several hosts    rank 3 (node01, gpu 3), without GPUs: rank 3 (node01)
    all on one host           rank 3 (gpu 3), without GPUs: rank 3

A host that all ranks share is left out: it is the one the reader looks at. The places are gathered once, when the
process groups exist, and kept by the process, as the hang detector is: whoever reports a lost rank can't ask it. Before
that, and for a single process, a rank is only its number. The GPU's number is the one that nvidia-smi shows: that of
CUDA_VISIBLE_DEVICES where it lists numbers. The module loads no torch: the launcher's messages use it too.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_LISTED = 16  # ranks in one message


@dataclass(frozen=True)
class RankPlace:
    """Where one rank runs. gpu: the number that nvidia-smi shows; None on a CPU."""

    host: str
    gpu: int | None


_places: list[RankPlace] = []


def this_place(gpu: int | None, environ: Mapping[str, str] = os.environ) -> RankPlace:
    """This process's place. gpu: torch's number of its device, or None on a CPU."""
    host = os.uname().nodename
    if gpu is not None:
        visible = [one.strip() for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        if gpu < len(visible) and visible[gpu].isdigit():
            gpu = int(visible[gpu])
    return RankPlace(host.split(".")[0], gpu)


def remember(places: Sequence[RankPlace]) -> None:
    """Keep every rank's place, in order of rank, for the messages of this process; an empty list forgets them."""
    _places[:] = places


def place_of_rank(rank: int) -> str:
    """'node01, gpu 3', without the host where all ranks share it; "" where nothing tells this rank from another."""
    if rank >= len(_places):
        return ""
    place = _places[rank]
    host = [place.host] if len({one.host for one in _places}) > 1 else []
    return ", ".join(host if place.gpu is None else [*host, f"gpu {place.gpu}"])


def rank_in_words(rank: int) -> str:
    """'rank 3 (node01, gpu 3)', or 'rank 3' where `place_of_rank` has nothing to add."""
    place = place_of_rank(rank)
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def listed_ranks(ranks: Sequence[int]) -> str:
    """'1 (node00, gpu 1), 9 (node01, gpu 1)', after 'rank ' or 'ranks '; of many the first MOST_LISTED and a count."""
    words = ", ".join(rank_in_words(rank).removeprefix("rank ") for rank in ranks[:MOST_LISTED])
    return words if len(ranks) <= MOST_LISTED else f"{words} and {len(ranks) - MOST_LISTED} more"


@functools.cache
def machine_id() -> str:
    """What tells this machine, since its last start, from any other: Linux's boot id, elsewhere the node's name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else os.uname().nodename


def this_process() -> dict[str, Any]:
    """What tells this process from any other, here and later: machine, process namespace, number and start time."""
    if sys.platform != "linux":
        return {"host": None, "pid": os.getpid(), "started": None}
    host = machine_id() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "started": process_state(os.getpid())[1]}


def process_state(pid: int) -> tuple[str, str]:
    """A process's state (T: stopped) and start time from Linux's /proc; "" where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
