"""Whether all nodes see the run directory that rank 0 has made: looked for once, at the start.

A path on a node's own disk is otherwise found hours later: the checkpoint of many ranks lies on many disks. The first
rank of each node (all ranks where LOCAL_RANK is not set) reads the lock that rank 0 has just written and compares its
text, which names rank 0's process; so an old copy of the directory is not taken for it. A network file system may show
a new file late: it is looked for again until SECONDS have passed. Only what a run needs anyway is read; nothing is
written.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from fp8moe.errors import ConfigError
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.place import this_place
from fp8moe.train.run_lock import LOCK_FILE

SECONDS = 35.0  # NFS keeps what it knows of a directory for 30 s
MOST_NAMED = 4  # nodes in the sentence


def check_shared(run_dir: Path, mesh: Mesh) -> None:
    """Raise ConfigError, the same on all ranks, where a node does not see rank 0's lock. Collective over all ranks."""
    if mesh.world_size == 1:
        return
    host = this_place(None).host
    first, written = gather((host, _text(run_dir / LOCK_FILE) if mesh.rank == 0 else None), mesh.world_group)[0]
    looks = mesh.rank > 0 and os.environ.get("LOCAL_RANK", "0") == "0"
    problem = lacks(run_dir, LOCK_FILE, written) if looks else None
    found = gather(None if problem is None else (host, problem), mesh.world_group)
    named = dict(one for one in reversed(found) if one is not None)  # the node's first rank's word stays
    if not named:
        return
    nodes = [f"{node} {reason}" for node, reason in reversed(named.items())]
    more = f" and {len(nodes) - MOST_NAMED} more nodes don't" if len(nodes) > MOST_NAMED else ""
    raise ConfigError(
        f"run_dir={run_dir} must be on a file system that all nodes share: {', '.join(nodes[:MOST_NAMED])}{more}; "
        f"rank 0 made it on {first}: use a run_dir on shared storage, the same path on every node"
    )


def lacks(folder: Path, name: str, written: str | None) -> str | None:
    """What this node lacks of `folder`, a clause; None where the file `name` there holds what rank 0 has written."""
    deadline = time.monotonic() + SECONDS
    while (text := _text(folder / name)) != written or text is None:
        if time.monotonic() > deadline:
            if not folder.is_dir():
                return "has no such directory"
            return "has another directory of that name" if text is None else "has another run's directory there"
        time.sleep(min(0.5, SECONDS / 5))
    return None


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # asks a file server anew
        return path.read_text(encoding="utf-8")
    return None
