"""Seconds of a piece of work on a card, and the source of each figure.

    products     `gemm_time`: record or model
    passes       bytes over what that kernel reaches of a copy's bandwidth, the SHARES below, measured on an H100
    attention    FLOPs over a rate that grows with the tiles there are to share out, of 128 queries and one head:
                     547 TFLOPS * tiles / (tiles + 151), forward and backward alike
                 through the two 4,096-token records of `layer-h100.json` (128 heads: 528, 16 heads: 423 TFLOPS, cuDNN);
                 FlashAttention-3 (arXiv 2407.08608) reaches 590 to 640 forward, causal, head size 128
    launches     3 microseconds of device time for a kernel that moves nothing

A layer under sustained load is slower than its kernels one by one: at full power the clock falls. All of these are
multiplied by SUSTAINED, a measured layer's time over the sum of its pieces: 1.14, 1.11, 1.09 and 1.08 in FP8 and 1.04,
1.03, 0.99 and 1.03 in BF16 for the four layers of `layer-h100.json` that are not bound by their host (`dsv3` at 4,096
and 16,384 tokens, `dsv2_lite` and `qwen3_mixture` at 16,384); their means are taken.

The host needs time for each launch, and a pass takes the longer of the two: HOST_SECONDS. Source: the two layers of
that file that the host binds in BF16 (9.39 ms for 75 launches as counted here, 8.37 for 66: 126 microseconds), times
0.755 and 0.79, by which launches have become cheaper since, twice, as `bench_host` measured on a CPU (`docs/layer.md`,
CUDA graphs; 0.79 is the mean of 0.75 in FP8 and 0.83 in BF16). A message's are cheaper: `bench_host` has 0.44 ms for
the four of a mixture in one hop, 0.66 ms in two, where a launch of the layer takes 40 microseconds, and exact counts
take about two launches more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fp8moe.kernels.tiles import HOPPER_SMS
from fp8moe.plan.gemm_time import product_time
from fp8moe.plan.work import Attention, Pass, Piece, Product, Shared, Small

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
SUSTAINED = {False: 1.02, True: 1.12}  # by whether the model is FP8
HOST_SECONDS = 75e-6  # of a launch
# The host's time of a mixture's messages, in launches of that kind, forward and backward, by the number of hops.
MESSAGE_LAUNCHES = {1: {"F": 7.0, "B": 4.0}, 2: {"F": 11.2, "B": 5.4}}
COUNTS_LAUNCHES = 2.0  # of exact counts

REDUNDANT = "keys of other ranks' tokens"  # the kind of what every rank that shares a sequence computes again

RECORD, MODEL, BYTES, FLOPS = "record", "model", "bytes", "FLOPs"


@dataclass(frozen=True)
class Card:
    """What times depend on: which card, what its copies reach, the SMs that computation may take, the precision."""

    name: str
    hbm: float  # bytes a second
    fp8: bool
    sms: int = HOPPER_SMS


Parts = dict[tuple[str, str], float]  # (kind of work, source) -> seconds


def seconds_of(piece: Product | Pass | Attention | Small, card: Card) -> tuple[str, str, float]:
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
    for one in pieces:
        piece, ranks = (one.piece, one.ranks) if isinstance(one, Shared) else (one, 1)
        kind, source, seconds = seconds_of(piece, card)
        seconds *= SUSTAINED[card.fp8]
        parts[kind, source] += seconds / ranks
        if ranks > 1:
            parts[REDUNDANT, source] += seconds - seconds / ranks
    return dict(parts)


def launches_of(pieces: Iterable[Piece]) -> int:
    """Kernels that the pieces launch; a norm's backward is two, attention's three."""
    count = 0
    for one in pieces:
        piece = one.piece if isinstance(one, Shared) else one
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


def message_launches(hops: int, *, exact: bool) -> dict[str, float]:
    """Of the messages of a mixture whose ranks share experts, fan-out and sums included."""
    launches = MESSAGE_LAUNCHES[hops]
    return {"F": launches["F"] + COUNTS_LAUNCHES * exact, "B": launches["B"], "W": 0.0}


def host_seconds(launches: float) -> float:
    """Seconds that the host takes for so many launches."""
    return launches * HOST_SECONDS
