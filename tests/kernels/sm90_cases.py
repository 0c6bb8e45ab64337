"""What is launched for the compile gate: each op of each device back end, with every production tile.

Tensors are never read, so they are unfilled. A tile is handed to the launcher in place of the table's choice, so that
the tiles of every device in the table are compiled, not only those of this one.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import release_of
from fp8moe.kernels.fp8 import E4M3, Fp8Tensor, scale_shape
from fp8moe.kernels.gluon.launch import can_fetch
from fp8moe.kernels.gluon.launch_tokens import can_fetch_tokens
from fp8moe.kernels.message_layout import MessageLayout
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.tiles import UNQUANTIZED, Tile

Case = tuple[str, Callable[[], Any]]
M, N, K = 4096, 4096, 7168
GROUPS = 4
SHORT = 1024
SUMS = ("add", "add_fetched", "add_long")  # by registers, to what TMA has fetched, by a TMA that adds
TOKEN_SUMS = SUMS[:2]  # of BF16 weight gradients
PAIRS_SINCE = (3, 8)  # of Triton

PINGPONG = Tile(128, 128, 6, 8, 4, consumers="pingpong")
# A way to share a program's work that no table has, because turns are faster: a tile that stands for all.
TRIALS = {
    ("gemm", "bf16"): (PINGPONG,),
    ("grouped_gemm", "bf16"): (PINGPONG,),
    ("grouped_wgrad", "add"): (PINGPONG,),
    ("grouped_wgrad", "add_long"): (PINGPONG,),
}


def rows(m: int, k: int) -> Fp8Tensor:
    """Unfilled FP8 rows (or columns) with M-major scales."""
    scale = torch.empty(scale_shape((m, k), (1, 128))[::-1])
    return Fp8Tensor(torch.empty(m, k, dtype=E4M3), scale.t())


def blocks(*shape: int) -> Fp8Tensor:
    """Unfilled FP8 weight blocks."""
    return Fp8Tensor(torch.empty(shape, dtype=E4M3), torch.empty(scale_shape(shape, (128, 128))), (128, 128))


def offsets() -> Tensor:
    return torch.zeros(GROUPS + 1, dtype=torch.int32)


@contextmanager
def chosen(tile: Tile) -> Iterator[None]:
    """As if the table had chosen `tile`, whatever a launcher remembers of a size."""
    remembered = importlib.import_module("fp8moe.kernels.triton.gemm").choose_tile
    remembered.cache_clear()
    with patch.object(tiles, "choose", lambda *_, **__: tile):
        yield
    remembered.cache_clear()


@contextmanager
def summed(kind: str) -> Iterator[None]:
    """Sums leave the Gluon kernel as `kind` of SUMS says, however many tokens they have and whatever the tile."""
    launch = importlib.import_module("fp8moe.kernels.gluon.launch")
    room = launch.SHARED_BYTES if kind == "add_fetched" else 0
    with (
        patch.object(launch, "ADDED_BY_TMA", 1 if kind == "add_long" else 1 << 30),
        patch.object(launch, "SHARED_BYTES", room),
    ):
        yield


def with_tile(tile: Tile, kind: str, launch: Callable[[], Any]) -> None:
    """Launch as if the table had chosen `tile`."""
    with chosen(tile), summed(kind):
        launch()


def gemm_cases(backend: str) -> Iterator[Case]:
    """gemm, grouped_gemm and grouped_wgrad with every tile that this Triton can run, output dtype and epilogue."""
    gemm = importlib.import_module(f"fp8moe.kernels.{backend}.gemm").gemm
    grouped_gemm = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_gemm").grouped_gemm
    grouped_wgrad = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_gemm").grouped_wgrad
    total, grads = torch.empty(M, N), torch.empty(GROUPS, M, N)
    columns, experts = (rows(M, K), rows(N, K)), (rows(M, K), blocks(GROUPS, N, K), offsets())
    few = rows(M, SHORT), rows(N, SHORT)
    launches = [
        ("gemm", "add", partial(gemm, rows(M, K), blocks(N, K), accumulate=total)),
        *(("gemm_columns", kind, partial(gemm, *few, accumulate=total)) for kind in SUMS),
        *(("grouped_wgrad", kind, partial(grouped_wgrad, *few, offsets(), grads)) for kind in SUMS),
    ]
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        launches += [
            ("gemm", kind, partial(gemm, rows(M, K), blocks(N, K), out_dtype=dtype)),
            ("gemm_columns", kind, partial(gemm, *columns, out_dtype=dtype)),
            ("grouped_gemm", kind, partial(grouped_gemm, *experts, out_dtype=dtype)),
        ]
    for op, kind, launch in launches:
        for tile in legal_tiles(backend, op, kind):
            yield f"{backend} {op} {kind} {tile_name(tile)}", partial(with_tile, tile, kind, launch)


def legal_tiles(backend: str, op: str, kind: str) -> tuple[Tile, ...]:
    """Production tiles of an op and its trials, with pairs where this Triton has them and the registers add.

    What is fetched needs room beside the ring, and a back end that does it.
    """
    pairs = release_of(triton.__version__) >= PAIRS_SINCE and kind not in ("add_long", "add_fetched")
    trials = TRIALS.get((op, kind), ()) if backend == "gluon" else ()
    found = (*tiles.production_tiles(backend, op, pairs=pairs), *trials)
    if kind != "add_fetched":
        return found
    fits = can_fetch_tokens if op in UNQUANTIZED else can_fetch
    return tuple(tile for tile in found if backend == "gluon" and fits(tile))


def tile_name(tile: Tile) -> str:
    """What of a tile changes its code; the swept rows are in it too, as a constant of the kernel."""
    ordered = f" {tile.consumers}" if tile.consumers != "free" else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.stages} group {tile.group}" + " multicast" * tile.multicast + ordered


def cast_cases() -> Iterator[Case]:
    """Every cast, from BF16 and from FP32, with both kinds of scales."""
    quantize = importlib.import_module("fp8moe.kernels.triton.quantize")
    e5m6 = importlib.import_module("fp8moe.kernels.triton.e5m6")
    m, k = 4096, 7168
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            for name in ("quantize_rows", "quantize_columns", "quantize_rows_and_columns"):
                cast = partial(getattr(quantize, name), torch.empty(m, k, dtype=dtype), power_of_two=power_of_two)
                yield f"triton {name} {label}", cast
            weight = torch.empty(GROUPS, 256, k, dtype=dtype)
            yield (
                f"triton quantize_blocks {label}",
                partial(quantize.quantize_blocks, weight, power_of_two=power_of_two),
            )
    yield "triton requantize_columns", partial(quantize.requantize_columns, rows(m, k))
    values = torch.empty(m, k, dtype=torch.bfloat16)
    yield "triton pack_e5m6 bf16", partial(e5m6.pack_e5m6, values)
    yield "triton e5m6", partial(_unpack, e5m6, values)


def _unpack(e5m6: Any, values: Tensor) -> None:
    packed = e5m6.pack_e5m6(values)
    e5m6.unpack_e5m6(packed)
    e5m6.e5m6_to_columns(packed)


def unquantized_cases() -> Iterator[Case]:
    """Weight gradients of BF16 with every tile and of FP32, dense and grouped, and the grouped products."""
    m, n, k = 4096, 256, 7168
    dy, x = (torch.empty(m, size, dtype=torch.bfloat16) for size in (n, k))
    gluon = {
        "wgrad": partial(importlib.import_module("fp8moe.kernels.gluon.gemm").wgrad, dy, x, torch.empty(n, k)),
        "grouped_mm_wgrad": partial(
            importlib.import_module("fp8moe.kernels.gluon.grouped_mm").grouped_mm_wgrad, dy, x, offsets(),
            torch.empty(GROUPS, n, k),
        ),
    }  # fmt: skip
    for op, kind in itertools.product(UNQUANTIZED, TOKEN_SUMS):
        for tile in legal_tiles("gluon", op, kind):
            yield f"gluon {op} {kind} {tile_name(tile)}", partial(with_tile, tile, kind, gluon[op])
    wgrad = importlib.import_module("fp8moe.kernels.triton.gemm").wgrad
    grouped = importlib.import_module("fp8moe.kernels.triton.grouped_mm")
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        dy, x, weights = (torch.empty(size, dtype=dtype) for size in ((m, n), (m, k), (GROUPS, n, k)))
        launches = {
            "wgrad": partial(wgrad, dy, x, torch.empty(n, k)),
            "grouped_mm_wgrad": partial(grouped.grouped_mm_wgrad, dy, x, offsets(), torch.empty(GROUPS, n, k)),
        }
        for op, launch in launches.items():
            for tile in tiles.production_tiles("triton", op):
                label = f" {tile_name(tile)}" if dtype is torch.bfloat16 else ""
                yield f"triton {op} {kind}{label}", partial(with_tile, tile, kind, launch)
        yield f"triton grouped_mm {kind}", partial(grouped.grouped_mm, x, weights, offsets())


def permute_cases() -> Iterator[Case]:
    """The plan, rows of every kind to experts and back, and the cast on the way."""
    ops = importlib.import_module("fp8moe.kernels.triton.permute")
    n, k, topk, received = 4096, 7168, 8, 8192
    numbers = torch.empty(received, dtype=torch.int64)
    inverse = torch.empty(n * topk, dtype=torch.int32)
    row_map = RowMap(numbers, numbers, offsets(), numbers[:GROUPS], inverse, n, topk)
    ids = torch.empty(n, topk, dtype=torch.int64)
    yield "triton plan_rows", partial(ops.plan_rows, ids, 256, room=received)
    token_major = rows(n, k)
    token_major = Fp8Tensor(token_major.data, token_major.scale.contiguous())
    for kind, x in (("fp8", rows(n, k)), ("fp8 token-major", token_major), ("fp8 K576", rows(n, 576))):
        yield f"triton permute {kind}", partial(ops.permute, x, row_map)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(n, k, dtype=dtype)
        yield f"triton permute {kind}", partial(ops.permute, x, row_map)
        yield f"triton unpermute {kind}", partial(ops.unpermute, torch.empty(received, k, dtype=dtype), row_map)
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            cast = partial(ops.permute_quantize, x, row_map, power_of_two=power_of_two)
            yield f"triton permute_quantize {label}", cast


def message_cases() -> Iterator[Case]:
    """Plans of messages and of what arrived, by ids of both kinds, and rows of every kind into a message and out."""
    ops = importlib.import_module("fp8moe.kernels.triton.message")
    plan = importlib.import_module("fp8moe.kernels.triton.permute").plan_rows
    n, k, topk, peers, received = 4096, 7168, 8, 8, 8192
    ids, weights = torch.empty(n, topk, dtype=torch.int64), torch.empty(n, topk)
    came = torch.empty(received, 3640, dtype=torch.int16)[:, 3596:3604]
    numbers, inverse = torch.empty(received, dtype=torch.int64), torch.empty(n * topk, dtype=torch.int32)
    row_map = RowMap(numbers, numbers, offsets(), numbers[:GROUPS], inverse, n, topk)
    yield "triton plan_message", partial(ops.plan_message, ids, peers, 32, room=received, fixed=True)
    yield "triton plan_message of a message", partial(ops.plan_message, came, 4, 8, room=received, first=32)
    yield "triton plan_rows of a message", partial(plan, came, 32, room=received, first=32, order=numbers)
    for kind, x in (("fp8", rows(n, k)), ("fp8 K576", rows(n, 576)), ("bf16", torch.empty(n, k, dtype=torch.bfloat16))):
        for carried, travelling in (("", (ids, weights)), (" without ids", (None, None))):
            layout = MessageLayout.of(x, topk if travelling[0] is not None else 0)
            message = torch.empty(n, layout.row_bytes, dtype=torch.uint8)
            yield f"triton pack_message {kind}{carried}", partial(ops.pack_message, x, row_map, *travelling, sender=3)
            yield f"triton unpack_message {kind}{carried}", partial(ops.unpack_message, message, row_map, layout)


def cases() -> Iterator[Case]:
    """All cases of both device back ends."""
    yield from gemm_cases("gluon")
    yield from gemm_cases("triton")
    yield from unquantized_cases()
    yield from cast_cases()
    yield from permute_cases()
    yield from message_cases()
    yield from importlib.import_module("tests.kernels.sm90_fused_cases").cases()
