"""Two dispatchers side by side for many rounds: no mismatch, no growth of memory.

The short run is part of the suite; FP8MOE_SOAK_ROUNDS=10000 makes the long one.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.parallel.ranks import TIMEOUT, run_ranks

ROUNDS = int(os.environ.get("FP8MOE_SOAK_ROUNDS", "150"))
WORLD, E, D, MOST = 4, 16, 128, 48
GROWTH = 16 * 2**20  # bytes a rank may grow after its first third: what an allocator keeps varies


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(rounds: int) -> int:
    """Growth in bytes of this rank's memory from a third of the rounds to the end."""
    mesh = build_mesh(1, WORLD, WORLD, timeout=TIMEOUT, ranks_per_node=2)
    one = make_dispatcher("all_to_all", mesh, E, max_tokens=MOST, chunks=2)
    two = make_dispatcher("node_limited", mesh, E, max_tokens=MOST)
    shared, mine = random.Random(0), random.Random(1 + mesh.rank)  # what all ranks must agree on, and what they needn't
    torch.manual_seed(mesh.rank)
    start = 0
    for number in range(rounds):
        if number == rounds // 3:
            start = resident()
        topk, tokens = shared.randint(1, 8), mine.choice([0, 1, mine.randint(2, MOST)])
        rows = quantize_rows(torch.randn(tokens, D), power_of_two=True)
        ids = torch.rand(tokens, E).topk(topk).indices
        weights = torch.rand(tokens, topk)
        messages = [d.dispatch(rows, d.announce(ids), weights) for d in (one, two)]  # both in flight
        a, b = (message.wait() for message in messages)
        assert isinstance(a.rows_RD, Fp8Tensor) and isinstance(b.rows_RD, Fp8Tensor)
        assert torch.equal(a.rows_RD.data.view(torch.uint8), b.rows_RD.data.view(torch.uint8)), number
        assert torch.equal(a.rows_RD.scale, b.rows_RD.scale) and torch.equal(a.weights_R, b.weights_R), number
        y_RD = a.rows_RD.dequantize()
        sums: list[Any] = [d.combine(y_RD, x.state) for d, x in ((one, a), (two, b))]
        if shared.random() < 0.5:
            sums.reverse()  # waits may come in any order
        for total in sums:
            torch.testing.assert_close(total.wait(), rows.dequantize() * topk, rtol=1e-5, atol=1e-6)
    return resident() - start


@pytest.mark.timeout(3600)
def test_many_rounds_side_by_side() -> None:
    growth = run_ranks(soak, WORLD, ROUNDS, timeout=30 + ROUNDS)
    print(f"{ROUNDS} rounds; growth of each rank in KiB: {[g // 1024 for g in growth]}")
    assert max(growth) < GROWTH, growth
