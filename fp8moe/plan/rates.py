"""Seconds of a piece of work on a card, and the source of each figure.

    products     `gemm_time`: record or model
    passes       bytes over what that kernel reaches of a copy's bandwidth, the SHARES below, measured on an H100
    attention    FLOPs over a rate that grows with the tiles there are to share out:
                     547 TFLOPS * tiles / (tiles + 151), tiles of 128 queries and one head, forward and backward together
                 through the two 4,096-token records of `layer-h100.json` (128 heads: 528, 16 heads: 423 TFLOPS); beside
                 it FlashAttention-3's paper (arXiv 2407.08608) has 590-640 forward, causal, head size 128
    launches     3 microseconds of device time for a kernel that moves nothing

The host needs time for each launch, and a phase takes the longer of the two: HOST_SECONDS. Source: the layer records of
an H100 (9.39 ms for 85 launches in BF16, 12.0 for 88 in FP8, both bound by the host), times what has been taken off
since then as `bench_host` measured it (BF16 0.76, FP8 0.67; `docs/layer.md`, CUDA graphs).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fp8moe.kernels.tiles import HOPPER_SMS
from fp8moe.plan.gemm_time import product_time
from fp8moe.plan.work import Attention, Pass, Piece, Product

# Of a copy's bandwidth, by kernel: benchmarks/results on an H100 (quantize, norm, rope, swiglu, permute, adamw).
SHARES = {
    "cast": 0.90,
    "cast both": 0.78,
    "columns of rows": 0.56,
    "pack": 0.19,
    "unpack": 0.50,
    "columns of 12 bits": 0.53,
    "norm": 0.77,
    "norm, residual": 0.99,
    "norm columns": 0.78,
    "norm backward": 1.0,
    "rotation": 0.90,
    "swiglu": 0.98,
    "swiglu backward": 0.60,
    "swiglu columns": 0.75,
    "permute": 0.60,
    "unpermute": 0.97,
    "add": 0.95,
    "cross entropy": 0.58,
    "update": 0.93,
}
ATTENTION_RATE, HALF_TILES = 547e12, 151
SMALL_SECONDS = 3e-6
PASS_SECONDS = 3e-6  # of a pass over memory, whatever its size
HOST_SECONDS = {False: 84e-6, True: 91e-6}  # of a launch, by whether the model is FP8

RECORD, MODEL, BYTES, FLOPS = "record", "model", "bytes", "FLOPs"


@dataclass(frozen=True)
class Card:
    """What times depend on: which card, what its copies reach, the SMs that computation may take, the precision."""

    name: str
    hbm: float  # bytes a second
    fp8: bool
    sms: int = HOPPER_SMS


Parts = dict[tuple[str, str], float]  # (kind of work, source) -> seconds


def seconds_of(piece: Piece, card: Card) -> tuple[str, str, float]:
    """(kind, source, seconds) of one piece of work."""
    if isinstance(piece, Product):
        timed = product_time(piece, card.name, card.sms)
        return ("FP8 products" if piece.fp8 else "BF16 products"), timed.source, timed.seconds
    if isinstance(piece, Pass):
        return piece.kind, BYTES, piece.bytes / (card.hbm * SHARES[piece.kernel]) + PASS_SECONDS
    if isinstance(piece, Attention):
        rate = ATTENTION_RATE * piece.tiles / (piece.tiles + HALF_TILES) * card.sms / HOPPER_SMS
        return "attention", FLOPS, piece.flops / rate
    return "small kernels", MODEL, piece.launches * SMALL_SECONDS


def parts_of(pieces: Iterable[Piece], card: Card) -> Parts:
    """Seconds by kind and source."""
    parts: Parts = defaultdict(float)
    for piece in pieces:
        kind, source, seconds = seconds_of(piece, card)
        parts[kind, source] += seconds
    return dict(parts)


def launches_of(pieces: Iterable[Piece]) -> int:
    """Kernels that the pieces launch; a norm's backward is two, attention's three."""
    count = 0
    for piece in pieces:
        count += getattr(piece, "launches", 1)
        count += isinstance(piece, Pass) and piece.kernel == "norm backward"
    return count


def total(parts: Parts) -> float:
    """Seconds of all parts."""
    return sum(parts.values())


def added(*many: Parts) -> Parts:
    """Several parts summed by kind and source."""
    parts: Parts = defaultdict(float)
    for one in many:
        for key, seconds in one.items():
            parts[key] += seconds
    return dict(parts)


def host_seconds(launches: float, card: Card) -> float:
    """Seconds that the host takes for so many launches."""
    return launches * HOST_SECONDS[card.fp8]
