"""A run directory that is not the same on all nodes, found at the start by real processes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fp8moe.errors import ConfigError
from fp8moe.train import shared_dir
from fp8moe.train.processes import claim_run_dir, mesh_of
from fp8moe.train.run_lock import LOCK_FILE, release
from tests.parallel.ranks import run_ranks
from tests.train.runs import configured


def claimed(folder: Path, nodes: list[str], local: list[str], run_dir: str = "run") -> str:
    """What claiming a run directory gives on a rank whose node has a disk of its own, `folder`/NODE."""
    rank = dist.get_rank()
    shared_dir.SECONDS = 0.3
    os.environ["LOCAL_RANK"] = local[rank]
    os.uname = lambda: SimpleNamespace(nodename=nodes[rank], release="")  # type: ignore[assignment, return-value]
    os.chdir(folder / nodes[rank])
    config = configured([f"run_dir={run_dir}"], world_size=len(nodes))
    mesh = mesh_of(config, torch.device("cpu"))
    try:
        path = claim_run_dir(config, mesh)
    except ConfigError as error:
        return f"{error}" if not (Path(run_dir) / LOCK_FILE).exists() or rank else "the lock is left"
    dist.barrier()
    release(path)
    return "claimed"


def test_nodes_with_disks_of_their_own_are_named(tmp_path: Path) -> None:
    for node in ("a", "b", "c"):
        (tmp_path / node).mkdir()
    (tmp_path / "c" / "run").mkdir()
    answers = run_ranks(claimed, 4, tmp_path, ["a", "a", "b", "c"], ["0", "1", "0", "0"])
    sentence = (
        "run_dir=run must be on a file system that all nodes share: b has no such directory, c has another directory "
        "of that name; rank 0 made it on a: use a run_dir on shared storage, the same path on every node"
    )
    assert answers == [sentence] * 4


def test_a_shared_directory_is_claimed(tmp_path: Path) -> None:
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
    assert run_ranks(claimed, 2, tmp_path, ["a", "b"], ["0", "0"], str(tmp_path / "run")) == ["claimed"] * 2


def test_a_copy_of_the_directory_and_a_file_that_shows_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_dir, "SECONDS", 0.2)
    (tmp_path / LOCK_FILE).write_text("an older run's")
    assert shared_dir.lacks(tmp_path, LOCK_FILE, "rank 0's") == "has another run's directory there"
    monkeypatch.setattr(shared_dir, "SECONDS", 5.0)
    shows: list[str | None] = [None, None, "rank 0's"]
    monkeypatch.setattr(shared_dir, "_text", lambda path: shows.pop(0))
    monkeypatch.setattr(shared_dir.time, "sleep", lambda seconds: None)
    assert shared_dir.lacks(tmp_path, LOCK_FILE, "rank 0's") is None and not shows
