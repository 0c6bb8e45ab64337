"""Processes of a run: which groups a configuration asks for, and a run directory that cannot be made."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.train import processes
from tests.train.runs import configured

ALONE = Mesh(1, 1, 1, rank=0)


@pytest.mark.parametrize(
    ("settings", "world_size", "tied", "mirrored", "ranks_per_node"),
    [
        ([], 1, False, False, None),
        (["model.mtp_depth=1"], 1, False, False, None),
        (["parallel.pp=2", "model.mtp_depth=0"], 2, False, False, None),
        (["parallel.pp=2", "model.mtp_depth=1"], 2, True, False, None),
        (["parallel.pp=2", "model.mtp_depth=1", "parallel.schedule=dualpipe"], 2, False, True, None),
        (["parallel.dispatcher=node_limited", "parallel.ranks_per_node=2"], 4, False, False, 2),
        (["parallel.ranks_per_node=2"], 4, False, False, None),
    ],
)
def test_the_groups_that_a_configuration_asks_for(
    settings: list[str],
    world_size: int,
    tied: bool,
    mirrored: bool,
    ranks_per_node: int | None,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(processes, "build_mesh", lambda *sizes, **options: asked.update(options, sizes=sizes))
    config = configured(corpus, *settings, "parallel.startup_timeout=7", world_size=world_size)
    processes.mesh_of(config, torch.device("cpu"))
    assert asked["sizes"] == (config.parallel.pp, config.dp, config.ep)
    assert (asked["tied"], asked["mirrored"], asked["ranks_per_node"]) == (tied, mirrored, ranks_per_node)
    assert asked["nccl_ctas"] is None and asked["timeout"].total_seconds() == 7


def test_a_run_directory_that_cannot_be_made(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(corpus, f"run_dir={tmp_path / 'run'}")
    assert processes.claim_run_dir(config, ALONE) == tmp_path / "run"

    def denied(*arguments: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(processes, "make_run_dir", denied)
    with pytest.raises(ValueError, match=r"run cannot be made \(Permission denied\): use another run_dir"):
        processes.claim_run_dir(config, ALONE)


@pytest.mark.parametrize(
    ("device", "cuda", "local", "chosen"),
    [("cpu", True, "1", "cpu"), ("auto", False, "0", "cpu"), ("auto", True, "1", "cuda:1")],
)
def test_a_rank_takes_its_own_gpu_if_there_is_one_and_no_other_is_asked_for(
    device: str, cuda: bool, local: str, chosen: str, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(corpus, f"device={device}")
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert str(processes.choose_device(config)) == chosen
    assert taken == ([] if chosen == "cpu" else [torch.device(chosen)])


def test_the_end_of_start_up_shortens_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links(ALONE, timedelta(seconds=900))
    reported: list[float] = []
    monkeypatch.setattr(processes.hang, "report_after", reported.append)
    processes.end_startup(ALONE, links, 300.0)
    assert reported == [240.0] and links.timeout == timedelta(seconds=300)
