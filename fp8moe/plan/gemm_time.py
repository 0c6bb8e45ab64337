"""Seconds of one matrix product on a card, and where the figure comes from: a record, or a model.

FP8 is this project's Gluon kernel: its record where one was measured on that card at that size, else `gemm_model`. BF16
products with BF16 outputs are cuBLAS's, or grouped products as fast: their record, else

    rate = 845 TFLOPS * K / (K + 150) * fill,  no less than the bytes need at what a copy reaches, plus 4 microseconds

where fill is the share of SMs that rounds of tiles keep busy, for the best of three tiles. The two constants are fitted
to the six dense records of an H100 (620 to 810 TFLOPS, `benchmarks/results/gemm-h100.json`); grouped products reach
0.97 of it there. BF16 weight gradients go into FP32 by a Triton kernel, timed by the cycles of
its tile (`fp8moe.kernels.tiles`) at 1.75 GHz.

Fewer SMs, as an overlapped pair leaves for communication, stretch a product by the ratio of the model's two times; a
record is stretched alike.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.tiles import HOPPER_SMS, choose, cycles
from fp8moe.plan.gemm_model import HBM_BYTES_PER_SECOND, START_SECONDS, Problem, predict, work_of
from fp8moe.plan.kernel_records import throughputs
from fp8moe.plan.work import Product

BF16_RATE, HALF_K = 845e12, 150  # of a long contraction; the K at which half of it is reached
GROUPED_SHARE = 0.97
BF16_TILES = ((128, 256, 1.0), (128, 192, 0.97), (128, 128, 0.9))  # rows, columns, share of the rate
CLOCK = 1.75e9
RECORD, MODEL = "record", "model"
_FP8_OPS = {  # (grouped, columns)
    (False, False): "gemm",
    (False, True): "gemm_columns",
    (True, False): "grouped_gemm",
    (True, True): "grouped_wgrad",
}


class Timed(NamedTuple):
    """Seconds, and their source: "record" or "model"."""

    seconds: float
    source: str


@functools.lru_cache(maxsize=8192)
def product_time(product: Product, card: str, sms: int = HOPPER_SMS) -> Timed:
    """Seconds of a product on `sms` SMs of a card."""
    whole = _modelled(product, card, HOPPER_SMS)
    stretch = _modelled(product, card, sms) / whole if sms != HOPPER_SMS else 1.0
    measured = _measured(product, card)
    if measured is not None:
        return Timed(measured * stretch, RECORD)
    return Timed(whole * stretch, MODEL)


def _measured(product: Product, card: str) -> float | None:
    """Seconds of the record of that size; a weight gradient's two sizes count in either order."""
    p = product
    if p.fp8:
        found, op = throughputs(card, "gluon"), _FP8_OPS[p.grouped, p.columns]
    elif p.columns:
        return None
    else:
        found, op = throughputs(card, "bf16 cublas"), "grouped_gemm" if p.grouped else "gemm"
    for m, n in ((p.m, p.n), (p.n, p.m))[: 2 if p.columns else 1]:
        tflops = found.get(f"{op} {Problem(op, m, n, p.k, groups=p.groups).label}")
        if tflops is not None:
            return p.flops / tflops / 1e12
    return None


def _modelled(p: Product, card: str, sms: int) -> float:
    if p.fp8:
        op = _FP8_OPS[p.grouped, p.columns]
        problem = Problem(op, p.m, p.n, p.k, "columns" if p.columns else "rows", p.groups)
        return predict(problem, work_of(problem, pairs=False, sms=sms)[0], device=card).seconds
    if p.columns:
        return _bf16_gradient(p, card, sms)
    fill = max(_fill(p, tile, sms) for tile in BF16_TILES)
    rate = BF16_RATE * p.k / (p.k + HALF_K) * fill * (GROUPED_SHARE if p.grouped else 1.0)
    moved = 2.0 * p.groups * ((p.m + p.n) * p.k + p.m * p.n)
    return max(p.flops / rate, moved / HBM_BYTES_PER_SECOND[card]) + START_SECONDS


def _fill(p: Product, tile: tuple[int, int, float], sms: int) -> float:
    """Useful share of a tile's rounds on all SMs of the card, the padding of the last row and column taken off."""
    block_m, block_n, share = tile
    programs = p.groups * ceil_div(p.m, block_m) * ceil_div(p.n, block_n)
    used = p.groups * p.m * p.n / (programs * block_m * block_n)
    return share * used * programs / (ceil_div(programs, sms) * HOPPER_SMS)


def _bf16_gradient(p: Product, card: str, sms: int) -> float:
    op = "grouped_mm_wgrad" if p.grouped else "wgrad"
    tile = choose("triton", op, p.m, p.n, p.k, groups=p.groups, sms=sms)
    busy = cycles(tile, op, p.m, p.n, p.k, groups=p.groups, sms=sms) / CLOCK
    moved = p.groups * (2.0 * (p.m + p.n) * p.k + 8.0 * p.m * p.n)
    return max(busy, moved / HBM_BYTES_PER_SECOND[card]) + START_SECONDS
