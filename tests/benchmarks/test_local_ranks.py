"""Ranks forked on this machine: rank 0's result, and the first failure as one sentence."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from benchmarks.local_ranks import run_on_ranks

TIMEOUT = timedelta(seconds=60)


def test_every_rank_runs_and_rank_0_answers() -> None:
    def ranks() -> list[int]:
        total = torch.tensor([10 ** dist.get_rank()])
        dist.all_reduce(total)
        return [dist.get_rank(), dist.get_world_size(), int(total), torch.get_num_threads()]

    assert run_on_ranks(ranks, 3, TIMEOUT) == [0, 3, 111, 1]


def test_a_failure_names_its_rank() -> None:
    def fails() -> None:
        if dist.get_rank() == 1:
            raise ValueError("no link")
        dist.barrier()

    with pytest.raises(RuntimeError, match=r"rank [01]: "):
        run_on_ranks(fails, 2, TIMEOUT)
