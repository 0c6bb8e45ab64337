"""BF16 weight gradients of the Hopper kernel on the machine: every production tile and epilogue against FP64.

Groups are shorter than a step, end within one or with one, and one is empty. Behind each group lies the next one's or,
behind the last, NaN, so that a row that is not cut off shows. All tiles go to one CTA, whose ring comes round several
times. What lies in the gradient before stays as it is, to the bit, in the empty group's part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.tiles import UNQUANTIZED, Tile
from tests.kernels.sm90_cases import TOKEN_SUMS, chosen, legal_tiles, summed, tile_name
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import Case, ops
from tests.ptx.product_cases import SCHEDULES, offsets, within

MODULES = {"wgrad": "gemm", "grouped_mm_wgrad": "grouped_mm"}
# Tokens of the groups, N and K by the name of a problem; dense: all of them together. "odd" can't be read by TMA.
PROBLEMS = {
    "aligned": ((128, 128), 128, 256), "small": ((3, 0, 70), 128, 272), "ragged": ((64, 0, 200, 1), 192, 400),
    "odd": ((33, 5), 13, 21),
}  # fmt: skip
ROWS = {"small": 144, "ragged": 200}  # N where no wave of 64 rows reaches into another expert's
SPARE = 9  # rows of nobody


def compare(machine: Machine, op: str, kind: str, tile: Tile, size: str, seeds: Any) -> None:
    """By every schedule of `seeds` the same gradient, and the FP64 sum within the bound of FP32 sums."""
    groups, n, k = PROBLEMS[size]
    grouped = op == "grouped_mm_wgrad"
    if kind == "add" or not grouped:
        n = ROWS.get(size, n)
    at = offsets(*(groups if grouped else (sum(groups),)))
    rows = int(at[-1]) + (0 if machine.count or not grouped else SPARE)
    dy, x = (torch.randn(rows, columns).bfloat16() for columns in (n, k))
    dy[int(at[-1]) :], x[int(at[-1]) :] = float("nan"), float("inf")
    before = torch.randn(len(at) - 1, n, k)
    call, first = getattr(ops("gluon", MODULES[op]), op), None
    for machine.seed in seeds:
        got = before.clone()
        with chosen(tile), limited_sms(1), summed(kind), on_machine(machine):
            call(dy, x, at, got) if grouped else call(dy, x, got[0])
        for e, (start, stop) in enumerate(itertools.pairwise(at.tolist())):
            assert start < stop or torch.equal(got[e], before[e]), f"schedule {machine.seed}: an empty group is written"
            within(got[e], before[e].double() + dy[start:stop].double().T @ x[start:stop].double())
        assert first is None or torch.equal(got, first), f"schedule {machine.seed} changes the result"
        first = got


def gradient(machine: Machine, op: str, kind: str, tile: Tile) -> None:
    if machine.count:
        compare(machine, op, kind, tile, "aligned", (None,))
        return
    compare(machine, op, kind, tile, "small", range(SCHEDULES if op == "grouped_mm_wgrad" else 2))
    compare(machine, op, kind, tile, "ragged", (None,))
    if kind == "add":
        compare(machine, op, kind, tile, "odd", (None,))


def cases() -> Iterator[Case]:
    """Dense and grouped, every way to add, every tile that has room for it."""
    for op in UNQUANTIZED:
        for kind in TOKEN_SUMS:
            for tile in legal_tiles("gluon", op, kind):
                yield f"gluon {op} {kind} {tile_name(tile)}", partial(gradient, op=op, kind=kind, tile=tile)
