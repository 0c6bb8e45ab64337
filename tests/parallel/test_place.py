"""The host and GPU that messages name beside a rank."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fp8moe.parallel import hang, place
from fp8moe.parallel.place import RankPlace, listed_ranks, place_of_rank, rank_in_words, remember, this_place
from fp8moe.train import finite_state, processes
from fp8moe.train.consistency import Difference
from tests.parallel.ranks import run_ranks
from tests.train.runs import configured


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    remember([])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([], "rank 1"),
        ([RankPlace("a", None), RankPlace("a", None)], "rank 1"),
        ([RankPlace("a", 0), RankPlace("a", 5)], "rank 1 (gpu 5)"),
        ([RankPlace("a", None), RankPlace("b", None)], "rank 1 (b)"),
        ([RankPlace("a", 0), RankPlace("b", 0)], "rank 1 (b, gpu 0)"),
        ([RankPlace("a", 0)], "rank 1"),
    ],
)
def test_a_rank_in_words(places: list[RankPlace], words: str) -> None:
    remember(places)
    assert rank_in_words(1) == words
    assert rank_in_words(1) == (f"rank 1 ({place_of_rank(1)})" if place_of_rank(1) else "rank 1")


def test_many_ranks_are_listed_and_counted() -> None:
    remember([RankPlace(f"n{rank // 2}", rank % 2) for rank in range(40)])
    assert listed_ranks([1, 2]) == "1 (n0, gpu 1), 2 (n1, gpu 0)"
    many = listed_ranks(list(range(40)))
    assert many.endswith("15 (n7, gpu 1) and 24 more") and many.count("gpu") == place.MOST_LISTED


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [({}, 1), ({"CUDA_VISIBLE_DEVICES": "4, 6"}, 6), ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1)],
)
def test_the_gpu_is_the_one_that_nvidia_smi_shows(visible: dict[str, str], gpu: int) -> None:
    assert this_place(1, visible).gpu == gpu
    assert this_place(None, visible) == RankPlace(os.uname().nodename.split(".")[0], None)


def test_sentences_on_a_state_name_the_places() -> None:
    remember([RankPlace("a", 0), RankPlace("b", 0), RankPlace("c", 0)])
    assert finite_state.described([[], ["w"], ["w"]]) == "w is not finite on ranks 1 (b, gpu 0), 2 (c, gpu 0)"
    assert str(Difference("w", (2,), 2)) == "w of rank 2 (c, gpu 0) differs from that of 2 other replicas"


def on_two_hosts(port: int) -> tuple[str, str]:
    """What a rank says of rank 1, and of the other one in a hang report."""
    rank = dist.get_rank()
    dist.barrier()  # a rank that is still connecting would lose this one
    time.sleep(0.1)
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.uname = lambda: SimpleNamespace(nodename=f"node{rank}.cluster")  # type: ignore[assignment, return-value]
    config = configured([], world_size=2)
    with processes.processes(config, torch.device("cpu")):
        said = rank_in_words(1), hang.missing_ranks(hang._current[0], "nowhere", 5, [1 - rank])
        dist.barrier()
    return said


def test_ranks_learn_of_each_other_and_a_hang_report_names_the_host() -> None:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    for rank, (said, missing) in enumerate(run_ranks(on_two_hosts, 2, port)):
        assert said == "rank 1 (node1)"
        assert missing.startswith(f"rank {1 - rank} (node{1 - rank}) is alive and stopped after number 0")


def test_a_process_is_told_apart_where_there_is_proc_and_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = place.this_process()
    assert mine["host"].startswith(place.machine_id()) and mine["started"] == place.process_state(os.getpid())[1] != ""
    monkeypatch.setattr(place.sys, "platform", "darwin")
    assert place.this_process() == {"host": None, "pid": os.getpid(), "started": None}
