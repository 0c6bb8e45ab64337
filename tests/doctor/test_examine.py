"""The examination by real gloo processes: a planted slow rank, odd node, wrong clock, private disk, dead rank."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8moe.doctor import host, network
from fp8moe.doctor.examine import examine
from fp8moe.doctor.finding import Level, Report
from fp8moe.errors import HangError
from fp8moe.parallel import hang
from fp8moe.train import shared_dir
from tests.parallel.ranks import run_ranks

SMALL = network.Sizes(1 << 14, 3)
Plant = Callable[[int], None]


def examined(port: int, plant: Plant, local: int, run_dir: str | None, seconds: float) -> Report | str | None:
    """The report of a rank whose machine `plant` has changed; `local` ranks to a node, named node0, node1, ..."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # a rank that is still connecting would lose this one
    time.sleep(0.1)
    dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local),
    }  # fmt: skip
    os.uname = lambda: SimpleNamespace(nodename=f"node{rank // local}")  # type: ignore[assignment, return-value]
    network.sizes_of = lambda device: SMALL
    shared_dir.SECONDS, hang.HEARTBEAT = 0.3, 0.2
    plant(rank)
    try:
        return examine(world_size, None if run_dir is None else Path(run_dir), seconds)
    except HangError as error:
        time.sleep(0.0 if rank else 2.0)  # it keeps the store that the others ask
        return str(error)


def on_ranks(world_size: int, plant: Plant, *, local: int = 4, run_dir: str | None = None, seconds: float = 60.0,
             absent: tuple[int, ...] = ()) -> list[Any]:  # fmt: skip
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    return run_ranks(examined, world_size, port, plant, local, run_dir, seconds, absent=absent)


def wrong(report: Report) -> dict[str, Level]:
    return {one.finding.text: one.finding.level for one in report.found if one.finding.level is not Level.OK}


def slowed(slow: set[int]) -> Plant:
    """Every message takes 20 ms, those of the `slow` ranks 120."""

    def plant(rank: int) -> None:
        real, pause = network.start_all_to_all, 0.12 if rank in slow else 0.02

        def start(*arguments: Any) -> Any:
            time.sleep(pause)
            return real(*arguments)

        network.start_all_to_all = start

    return plant


def test_four_sound_ranks_have_figures_of_every_size(tmp_path: Path) -> None:
    report, *others = on_ranks(4, slowed(set()), run_dir=str(tmp_path / "run"))
    assert others == [None] * 3 and wrong(report) == {}
    figures = report.figures["network"]
    assert [one["ranks"] for one in figures["groups"]] == [2, 4] and len(figures["pairs"]) == 4
    for one in figures["groups"]:
        assert all(value > 0 for value in one.values())
        share = (one["ranks"] - 1) / one["ranks"]
        assert one["all_to_all_gb_per_second"] < share * SMALL.message / 0.02 / 1e9
    assert all(speed < SMALL.message / 0.02 / 1e9 for speed in figures["pairs"])
    assert "clocks of all ranks agree" in report.as_text() and list(tmp_path.iterdir()) == []


def test_a_slow_rank_is_named() -> None:
    report = on_ranks(4, slowed({2}))[0]
    ((text, level),) = wrong(report).items()
    assert level is Level.ADVICE and text.startswith("rank 2 is odd: its messages in pairs have ")
    assert "leave rank 2 out" in report.as_text()


def test_an_odd_node_is_named() -> None:
    report = on_ranks(6, slowed({2, 3}), local=2)[0]
    ((text, level),) = wrong(report).items()
    assert level is Level.ADVICE and text.startswith("node node1 is odd: ")


def test_a_clock_a_disk_and_a_limit_of_one_node(tmp_path: Path) -> None:
    for node in ("node0", "node1", "node2"):
        (tmp_path / node).mkdir()

    def plant(rank: int) -> None:
        os.chdir(tmp_path / f"node{rank}")
        Path("run").mkdir()
        if rank == 1:
            host.time = SimpleNamespace(time=lambda: time.time() + 40.0)  # type: ignore[assignment]
        host.available_bytes = lambda: 10**9 if rank == 2 else 10**11
        slowed(set())(rank)

    report = on_ranks(3, plant, local=1, run_dir="run")[0]
    lines = report.as_text().splitlines()
    assert "  ! rank 1 (node1): its clock is 40 s ahead of that of rank 0" in lines
    assert sum("GB of memory free" in line and line.startswith("  ! node2: ") for line in lines) == 1
    for rank in (1, 2):
        folder, node = tmp_path / f"node{rank}" / "run", f"node{rank}"
        assert f"  X rank {rank} ({node}): {folder} is not shared: {node} has another directory of that name" in lines
    to_fix = lines[lines.index("to fix (X: prevents a run)") + 1 :]
    assert [line.split(":")[0][4:] for line in to_fix] == [
        " X rank 1 (node1)", " X rank 2 (node2)", " ! rank 1 (node1)", " ! node2"
    ]  # fmt: skip


def test_a_rank_that_dies_is_one_sentence() -> None:
    def plant(rank: int) -> None:
        if rank == 1:
            network.measure = lambda *arguments: os._exit(9)

    answers = on_ranks(3, plant, local=3, seconds=5.0, absent=(1,))
    for rank in (0, 2):
        assert isinstance(answers[rank], str) and "rank 1 has ended or is frozen" in answers[rank], answers


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_partners_meet_everyone_once(world_size: int) -> None:
    rounds = world_size - 1 + world_size % 2
    for rank in range(world_size):
        met = [network.partner(rank, number, world_size) for number in range(rounds)]
        assert sorted(one for one in met if one is not None) == [one for one in range(world_size) if one != rank]
        for number, other in enumerate(met):
            assert other is None or network.partner(other, number, world_size) == rank


def test_group_sizes() -> None:
    assert network.group_sizes(16, 8) == [2, 4, 8, 16] and network.group_sizes(12, 4) == [2, 4, 12]
    assert network.group_sizes(6, 2) == [2, 6] and network.group_sizes(2, 1) == [2]


def test_a_network_that_is_not_what_it_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def figures(within: float, between: float) -> dict[str, Any]:
        base = {"all_reduce_gb_per_second": 1.0, "latency_microseconds": 1.0, "slowest_all_to_all_gb_per_second": 1.0}
        speeds = {8: within, 16: between}
        groups = [base | {"ranks": size, "all_to_all_gb_per_second": one} for size, one in speeds.items()]
        return {"groups": groups, "pairs": [1.0] * 16}

    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    hosts, cuda = ["a"] * 8 + ["b"] * 8, SimpleNamespace(type="cuda")

    def found(within: float, between: float, device: Any = cuda) -> list[str]:
        lines = network.check_network(figures(within, between), hosts, 8, device)
        return [one.text.split(":")[0] for one in lines if one.level is not Level.OK]

    assert found(300.0, 40.0) == []
    assert found(20.0, 40.0) == ["20 GB/s within a node"]
    assert found(300.0, 1.0) == ["1 GB/s between nodes that have InfiniBand"]
    assert found(20.0, 1.0, SimpleNamespace(type="cpu")) == []
    monkeypatch.setattr(network, "INFINIBAND", tmp_path / "none")
    assert found(300.0, 1.0) == []


def test_a_ranks_speed_is_the_median_over_its_partners_of_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[4e-6, 1e-6], [2e-6, 9e-6], [8e-6, 8e-6]])
    monkeypatch.setattr(network, "_times", lambda *arguments: next(times))
    group: Any = SimpleNamespace(size=lambda: 4, rank=lambda: 0)
    speed = network._in_pairs(group, torch.device("cpu"), network.Sizes(1000, 2))
    assert speed == pytest.approx(1000 / 2e-6 / 1e9)
