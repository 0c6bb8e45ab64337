"""The run directory: whether it can be written, its free space, and whether all nodes see what rank 0 writes there.

A file with a token is written by rank 0 and removed again. A directory that does not exist yet is not made: its nearest
parent that exists is looked at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from torch.distributed import ProcessGroup

from fp8moe.doctor.finding import Finding, Level
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.place import this_place
from fp8moe.train.shared_dir import lacks

PART = "storage"
LEAST_FREE = 10e9  # bytes; what a run needs depends on its model: `fp8moe plan`


def check_run_dir(run_dir: Path, group: ProcessGroup | None, *, looks: bool) -> list[Finding]:
    """Lines on `run_dir` as this rank sees it. looks: whether it speaks for its node. Collective over `group`."""
    host, is_first = this_place(None).host, group is None or group.rank() == 0
    folders = (run_dir.absolute(), *run_dir.absolute().parents)  # a relative path is another one on another node
    levels = next(number for number, one in enumerate(folders) if one.is_dir())
    folder, token, name = folders[levels], uuid.uuid4().hex, ""
    found: list[Finding] = []
    if is_first:
        found.append(_space(run_dir, folder))
        if (nearest := next(one for one in folders if os.path.lexists(one))) != folder:
            text = f"{nearest} is no directory, and run_dir={run_dir} must be one"
            found.append(Finding(PART, text, Level.STOP, "name another run_dir"))
        try:
            name = f".doctor-{token}"
            (folder / name).write_text(token)
        except OSError as error:
            name = ""
            fix = "name another run_dir, or give this user the right to write there"
            found.append(Finding(PART, f"{folder} can't be written: {error.strerror}", Level.STOP, fix))
    try:
        first_host, levels, written, name = gather((host, levels, token, name), group)[0]
        folder = folders[min(levels, len(folders) - 1)]
        if name and looks and not is_first and (problem := lacks(folder, name, written)) is not None:
            fix = (
                f"use a run_dir on storage that all nodes share, the same path on every node: rank 0 is on {first_host}"
            )
            found.append(Finding(PART, f"{folder} is not shared: {host} {problem}", Level.STOP, fix))
        gather(None, group)  # the token stays until all have looked
    finally:
        if is_first and name:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    return found


def _space(run_dir: Path, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"run_dir={run_dir}: {free / 1e9:.3g} GB free"
    if free >= LEAST_FREE:
        return Finding(PART, text)
    fix = f"free space at {folder}, or name another run_dir: a checkpoint takes 12 to 18 bytes a parameter"
    return Finding(PART, text, Level.ADVICE, fix)
