"""Attention of a token to a cache: bytes of entries a second, beside a plain copy and PyTorch's attention.

    python -m benchmarks.bench_decode_attention [--quick] [--json FILE]

What is counted is the entries of all sequences, once, and of a copy its result as well: a token's attention waits for
that. `torch` is scaled_dot_product_attention of the same queries, whatever kernel it takes; sequences are equally
long, since it knows no others. A name begins with the back end that ran: on a CPU that is the reference, whose figures
say how long a test takes and nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels import backend
from fp8moe.kernels.decode_attention import decode_attention

SUBJECT = "attention to a cache"


@dataclass(frozen=True)
class Shape:
    """Sequences of so many tokens; heads, heads of keys, features of a key and of a value (less: its first ones)."""

    sequences: int
    tokens: int
    heads: int
    groups: int
    key: int
    value: int

    @property
    def name(self) -> str:
        return f"B{self.sequences} L{self.tokens} H{self.heads}/{self.groups} {self.key}/{self.value}"


SHAPES = {
    # Moonlight's latents, of many sequences, of few long ones and of two; Qwen3-30B's heads; DeepSeek-V3's latents.
    "cuda": (
        Shape(64, 16384, 16, 1, 576, 512),
        Shape(64, 16384, 32, 4, 128, 128),
        Shape(8, 32768, 16, 1, 576, 512),
        Shape(2, 4096, 16, 1, 576, 512),
        Shape(16, 8192, 128, 1, 576, 512),
    ),
    "cpu": (Shape(4, 512, 16, 1, 576, 512),),
}


def ways(shape: Shape, device: torch.device) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write)."""
    width = shape.key if shape.key > shape.value else 2 * shape.groups * shape.key
    entries = torch.randn(shape.sequences, shape.tokens, width, device=device).bfloat16()
    if width == shape.key:
        keys = entries.unsqueeze(2)
        values = keys[..., : shape.value]
    else:
        keys, values = entries.unflatten(-1, (2, shape.groups, -1)).unbind(2)
    q = torch.randn(shape.sequences, 1, shape.heads, shape.key, device=device).bfloat16()
    places = torch.full((shape.sequences, 1), shape.tokens - 1, device=device)

    def composed() -> Tensor:
        of_heads = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        return scaled_dot_product_attention(*of_heads, enable_gqa=True)

    def attended() -> Tensor:
        return decode_attention(q, keys, values, places, length=shape.tokens, scale=shape.key**-0.5)

    return {
        COPY: (entries.clone, 2 * size_of(entries)),
        "decode attention": (attended, size_of(entries)),
        "torch": (composed, size_of(entries)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and PyTorch's"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider("decode_attention", backend.resolve(device))
    shapes = SHAPES[device.type]
    for shape in shapes[:1] if arguments.quick else shapes:
        add_bandwidths(report, ways(shape, device), shape.name, arguments, runs, ("torch",))
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
