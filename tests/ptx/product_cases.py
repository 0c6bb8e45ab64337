"""GEMMs on the machine: every production tile and epilogue of both back ends against the reference, by many schedules.

A case is named as its kernel is in the compile table. All tiles of a problem go to one CTA where the kernel is
persistent, so that its ring comes round several times and passes from one tile to the next; every size has a short
last tile, groups are ragged, one is empty, and rows belong to nobody behind the last. Outputs are full of NaN before.

Gluon kernels run by ten random schedules on a smaller problem, after the one that is not random.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.fp8 import Fp8Tensor
from tests.distance import calc_diff
from tests.kernels.sm90_cases import chosen, legal_tiles, summed, tile_name
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import Case, ops

SCHEDULES = 10
NAN = 0x7F  # a code of E4M3
BOUNDS = {torch.bfloat16: 5e-6, torch.float32: 1e-12}  # of `calc_diff`
MODULES = {"gemm_columns": "gemm", "grouped_wgrad": "grouped_gemm"}
# Rows, columns and contraction by the name of a size; the tokens of its groups; rows and columns of their sums, where
# TMA adds whole waves of an expert's rows. "tiny" are the sizes at which a compiled FP8 weight gradient lost every
# fourth column on Triton 3.8 (pytorch/pytorch issue 188841); "pair" lets the ring of two CTAs come round.
SIZES = {
    "aligned": (256, 256, 512), "small": (144, 144, 272), "ragged": (200, 272, 400), "sixteens": (208, 272, 400),
    "tiny": (32, 16, 16), "pair": (144, 272, 528),
}  # fmt: skip
GROUPS = {"aligned": (256, 256), "small": (128, 0, 128), "ragged": (128, 0, 256), "tiny": (128,), "pair": (384, 0, 256)}
GROUPS_OF_ROWS = GROUPS | {"pair": (128, 0, 256)}  # of a grouped GEMM, whose ring comes round three times by then
SUMS = {"aligned": (256, 256), "small": (144, 272), "ragged": (144, 272), "tiny": (32, 16), "pair": (144, 272)}
SUMS_BY_TMA = SUMS | {"small": (192, 320), "ragged": (192, 320), "tiny": (64, 16)}


def rows(m: int, k: int) -> Fp8Tensor:
    return ops("reference", "quantize").quantize_rows(torch.randn(m, k).to(torch.bfloat16))


def spoilt_rows(m: int, k: int) -> Fp8Tensor:
    """Rows of which the first ends in NaN, as the casts write it: in the code and in the scale."""
    found = rows(m, k)
    found.data.view(torch.uint8)[0, -1] = NAN
    found.scale[0, -1] = float("nan")
    return found


def columns(t: int, k: int) -> Fp8Tensor:
    """Columns of a [t, k] tensor, K-major."""
    found = ops("reference", "quantize").quantize_columns(torch.randn(t, k).to(torch.bfloat16))
    return Fp8Tensor(found.data.contiguous(), found.scale, found.tile)


def blocks(*shape: int) -> Fp8Tensor:
    return ops("reference", "quantize").quantize_blocks(torch.randn(shape).to(torch.bfloat16))[0]


def offsets(*sizes: int) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def problem(op: str, kind: str, size: str, *, spoilt: bool = False) -> Callable[[Callable[..., Any]], Tensor]:
    """A function that calls an op of any back end on operands drawn here, of a size of SIZES, and gives its output."""
    rows_of = spoilt_rows if spoilt else rows
    out_dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    m, n, k = SIZES[size]
    if op == "gemm":
        a, b = rows_of(m, k), blocks(n, k)
    elif op == "gemm_columns":
        a, b = columns(k, m), columns(k, n)
    else:
        groups = (GROUPS_OF_ROWS if op == "grouped_gemm" else GROUPS)[size]
        at, experts, tokens = offsets(*groups), len(groups), sum(groups)
        if op == "grouped_gemm":
            a, b = rows_of(tokens + (size == "ragged") * 66, k), blocks(experts, n, k)
            return lambda call: call(a, b, at, out_dtype=out_dtype)
        m, n = (SUMS if kind == "add" else SUMS_BY_TMA)[size]
        a, b = columns(tokens, m), columns(tokens, n)
        return partial(_add_groups, a=a, b=b, at=at, before=torch.randn(experts, m, n))
    before = torch.randn(a.shape[0], n)
    if kind.startswith("add"):
        return lambda call: call(a, b, out_dtype=out_dtype, accumulate=before.clone())
    return lambda call: call(a, b, out_dtype=out_dtype)


def _add_groups(call: Callable[..., None], *, a: Fp8Tensor, b: Fp8Tensor, at: Tensor, before: Tensor) -> Tensor:
    total = before.clone()
    call(a, b, at, total)
    return total


def compare(machine: Machine, backend: str, op: str, kind: str, tile: tiles.Tile, size: str, seeds: Any) -> None:
    """By every schedule of `seeds` the same product, within its format's bound of the reference's.

    Where the consumers have an order it is the product that they compute without, to the bit.
    """
    module, name, run = MODULES.get(op, op), op.removesuffix("_columns"), problem(op, kind, size)
    expected, call = run(getattr(ops("reference", module), name)), partial(run, getattr(ops(backend, module), name))
    sms = 2 if tile.multicast or (tile.consumers == "pingpong" and size == "ragged") else 1
    first = None if machine.count or tile.consumers == "free" else _unordered(machine, call, kind, tile, sms)
    for machine.seed in seeds:
        got = _run(machine, call, kind, tile, sms)
        diff = calc_diff(got, expected)
        assert diff <= BOUNDS[got.dtype], (
            f"schedule {machine.seed}: calc_diff {diff:.1e} exceeds {BOUNDS[got.dtype]:.0e}"
        )
        assert first is None or torch.equal(got, first), f"schedule {machine.seed} changes the result"
        first = got
        kernel, counts = machine.launched[-1]
        if (tile.consumers, op, size) == ("pingpong", "gemm", "small"):
            check_pingpong(counts.started)
        if tile.consumers == "turns":
            check_turns(counts.started)
            under_way = re.findall(r"wgmma\.commit_group(.*?)wgmma\.wait_group", kernel.text, re.DOTALL)
            assert all(part.count("mbarrier.arrive.shared") == 1 for part in under_way), "a turn is passed too late"


def spoil(machine: Machine, op: str, tile: tiles.Tile) -> None:
    """NaN in a row stays there: nothing of a tile's products is left for the tile behind it."""
    run = problem(op, "fp32", "small", spoilt=True)
    expected, machine.seed = run(getattr(ops("reference", op), op)), None
    got = _run(machine, partial(run, getattr(ops("gluon", op), op)), "fp32", tile, 1)
    assert expected[0].isnan().all() and not expected[1:].isnan().any()
    assert torch.equal(got.isnan(), expected.isnan()), "NaN of a row is in another one's sums"


def check_turns(started: list[tuple[Any, np.ndarray]]) -> None:
    """Products of each CTA started in turns: consumer 0's, consumer 1's, consumer 0's next, whichever warp is ahead."""
    waves: dict[Any, list[int]] = {}  # of each warp of the two consumers
    for cta, warps in started:
        found = waves.setdefault(cta, [0] * 8)
        for warp in warps:
            consumer = int(warp) // 4
            others = found[4:] if consumer == 0 else found[:4]
            wave, other = found[warp], min(others)
            assert other >= wave + consumer, f"consumer {consumer} starts wave {wave} out of turn"
            found[warp] += 1


def check_pingpong(started: list[tuple[Any, np.ndarray]]) -> None:
    """Products of the 4 tiles of "small", two a step: the second consumer starts when the first has left half of its
    first tile, and no tile is computed twice."""
    steps = -(-SIZES["small"][2] // 128)
    second = next(i for i, (_, warps) in enumerate(started) if warps[0] // 4 == 1)
    before = [warp for _, warps in started[:second] for warp in warps]
    assert min(before.count(warp) for warp in range(4)) >= steps // 2 * 2, (
        "both consumers of a ping-pong start together"
    )
    products = sum(len(warps) for _, warps in started) // 4
    assert products == 4 * steps * 2, f"{products} products of 64x128 where {4 * steps * 2} are enough"


def _run(machine: Machine, call: Callable[[], Tensor], kind: str, tile: tiles.Tile, sms: int) -> Tensor:
    """What `call` gives with `tile`."""
    with chosen(tile), limited_sms(sms), summed(kind), on_machine(machine):
        return call()


def _unordered(machine: Machine, call: Callable[[], Tensor], kind: str, tile: tiles.Tile, sms: int) -> Tensor:
    """What the kernel gives whose consumers have no order: no part of the case, and never edited."""
    edit, seed, launched = machine.edit, machine.seed, machine.launched
    machine.edit, machine.seed, machine.launched = None, None, []
    try:
        return _run(machine, call, kind, replace(tile, consumers="free"), sms)
    finally:
        machine.edit, machine.seed, machine.launched = edit, seed, launched


def product(machine: Machine, backend: str, op: str, kind: str, tile: tiles.Tile) -> None:
    if machine.count:
        compare(machine, backend, op, kind, tile, "aligned", (None,))
        return
    order, seeds = tile.consumers, range(SCHEDULES) if backend == "gluon" else range(1)
    if op == "grouped_gemm" or order != "turns":  # has tiles without steps, or tiles for two programs
        # Rows that are no multiple of 16 are another kernel where their number is known to be one: two kinds have it.
        sixteens = order == "free" and kind in ("fp32", "add_long") and op in ("gemm", "gemm_columns")
        schedules = (None, 0, 1) if order == "turns" else (None,)
        compare(machine, backend, op, kind, tile, "sixteens" if sixteens else "ragged", schedules)
    compare(machine, backend, op, kind, tile, "pair" if tile.multicast else "small", seeds)
    if order != "turns":
        compare(machine, backend, op, kind, tile, "tiny", (None,))
    if backend == "gluon" and kind == "fp32" and op in ("gemm", "grouped_gemm") and not tile.multicast:
        spoil(machine, op, tile)


WGRAD_SIZES = ((200, 144, 272, None), (72, 16, 48, 1))


def wgrad(machine: Machine, dtype: torch.dtype, tile: tiles.Tile, sizes: Any = WGRAD_SIZES) -> None:
    """The unquantized weight gradient; the bound is that of FP32 sums in another order. sizes: (T, N, K, schedule)."""
    for t, n, k, seed in ((128, 128, 256, None),) if machine.count else sizes:
        dy, x, before = torch.randn(t, n).to(dtype), torch.randn(t, k).to(dtype), torch.randn(n, k)
        got, machine.seed = before.clone(), seed
        with chosen(tile), on_machine(machine):
            ops("triton", "gemm").wgrad(dy, x, got)
        within(got, before.double() + dy.double().T @ x.double())


def within(got: Tensor, exact: Tensor, bound: float = 1e-12) -> None:
    diff = calc_diff(got, exact)
    assert diff <= bound, f"calc_diff {diff:.1e} exceeds {bound:.0e}"


def grouped_mm_wgrad(machine: Machine, dtype: torch.dtype, tile: tiles.Tile) -> None:
    """The same of groups that start anywhere, of less than a step, of one and of more, one empty; NaN behind them."""
    shapes = ((128, 128), 128, 256, None), ((3, 0, 64, 70), 144, 136, None), ((70, 5), 16, 48, 1)
    for groups, n, k, seed in shapes[:1] if machine.count else shapes[1:]:
        at, spare = offsets(*groups), 0 if machine.count else 9
        dy, x = (torch.randn(sum(groups) + spare, size).to(dtype) for size in (n, k))
        dy[sum(groups) :], x[sum(groups) :] = float("nan"), float("nan")
        before = torch.randn(len(groups), n, k)
        got, machine.seed = before.clone(), seed
        with chosen(tile), on_machine(machine):
            ops("triton", "grouped_mm").grouped_mm_wgrad(dy, x, at, got)
        for e, (start, stop) in enumerate(itertools.pairwise(at.tolist())):
            within(got[e], before[e].double() + dy[start:stop].double().T @ x[start:stop].double())


def grouped_mm(machine: Machine, dtype: torch.dtype) -> None:
    """x [R, K] by the weight of each row's group; rows behind the last group are zero whatever they hold."""
    wide = 1040 if dtype is torch.bfloat16 else 80  # rows of more than 1,024 are zeroed in two goes
    for groups, n, k in (((128, 64, 64), 128, 256),) if machine.count else (((3, 0, 64, 70), wide, 48),):
        at, x, w = (
            offsets(*groups),
            torch.randn(sum(groups) + 70, k).to(dtype),
            torch.randn(len(groups), n, k).to(dtype),
        )
        x[sum(groups) :] = float("nan")
        with on_machine(machine):
            got = ops("triton", "grouped_mm").grouped_mm(x, w, at)
        expected = ops("reference", "grouped_mm").grouped_mm(x, w, at)
        within(got, expected.double(), BOUNDS[dtype])
        assert not bool(got[sum(groups) :].any()), "rows of nobody are not zero"


KINDS = {
    "gemm": ("bf16", "fp32", "add"), "gemm_columns": ("bf16", "fp32", "add", "add_fetched", "add_long"),
    "grouped_gemm": ("bf16", "fp32"), "grouped_wgrad": ("add", "add_fetched", "add_long"),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every product of both device back ends."""
    for backend in ("gluon", "triton"):
        for op, kinds in KINDS.items():
            for kind in kinds:
                for tile in legal_tiles(backend, op, kind):
                    yield f"{backend} {op} {kind} {tile_name(tile)}", _case(backend, op, kind, tile)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for op, run in (("wgrad", wgrad), ("grouped_mm_wgrad", grouped_mm_wgrad)):
            for tile in tiles.production_tiles("triton", op):
                label = f" {tile_name(tile)}" if dtype is torch.bfloat16 else ""
                yield f"triton {op} {kind}{label}", partial(run, dtype=dtype, tile=tile)
        yield f"triton grouped_mm {kind}", partial(grouped_mm, dtype=dtype)


def _case(backend: str, op: str, kind: str, tile: tiles.Tile) -> Any:
    return partial(product, backend=backend, op=op, kind=kind, tile=tile)
