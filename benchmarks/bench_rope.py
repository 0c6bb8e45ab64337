"""RoPE with its concatenation: bytes read and written a second, beside a plain copy and the composition it replaces.

    python -m benchmarks.bench_rope [--quick] [--json FILE]

What is counted is what must move: every source and every result once. `torch` entries are slices, rotation in FP32 and
concatenation, one PyTorch op after the other, counted with the same bytes; backward's is autograd's of it, forward
included. The ratio is bytes a second over those of a plain copy of q. A name begins with the back end that ran: on a
CPU that is the reference, whose figures say how long a test takes and nothing about a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels import backend
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward

SUBJECT = "RoPE"
NOPE, ROPE, V = 128, 64, 128
SIZES = {"cuda": ((4096, 128), (16384, 16)), "cpu": ((256, 16),)}  # tokens, heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, rope] rotated by PyTorch's own ops."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


def ways(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write)."""
    keys = rope_keys(kv, k_rope, cos, sin, nope_dim=NOPE)
    queries_bytes, keys_bytes = 2 * size_of(q), size_of(keys) + size_of(kv) * NOPE // (NOPE + V)
    back_bytes, dv = size_of(keys) + size_of(kv[..., NOPE:].contiguous()) + size_of(kv), kv[..., NOPE:]

    def torch_queries(q: Tensor = q) -> Tensor:
        return torch.cat([q[..., :NOPE], rotate(q[..., NOPE:], cos, sin)], dim=-1)

    def torch_keys(kv: Tensor = kv, k_rope: Tensor = k_rope) -> Tensor:
        shared = rotate(k_rope[:, None], cos, sin).expand(-1, kv.shape[1], -1)
        return torch.cat([kv[..., :NOPE], shared], dim=-1)

    leaves = [x.detach().requires_grad_() for x in (q, kv, k_rope)]

    def torch_backward() -> object:
        outputs = torch_queries(leaves[0]), torch_keys(*leaves[1:]), leaves[1][..., NOPE:]
        return torch.autograd.grad(outputs, leaves, (q, keys, dv))

    def backward() -> object:
        return rope_queries_backward(q, cos, sin), rope_keys_backward(keys, dv, cos, sin)

    return {
        COPY: (lambda: q.clone(), queries_bytes),
        "queries": (lambda: rope_queries(q, cos, sin), queries_bytes),
        "torch queries": (torch_queries, queries_bytes),
        "keys": (lambda: rope_keys(kv, k_rope, cos, sin, nope_dim=NOPE), keys_bytes),
        "torch keys": (torch_keys, keys_bytes),
        "backward": (backward, queries_bytes + back_bytes),
        "torch forward and backward": (torch_backward, 2 * queries_bytes + keys_bytes + back_bytes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and PyTorch's composition"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider("rope_queries", backend.resolve(device))
    sizes = SIZES[device.type]
    for t, heads in sizes[:1] if arguments.quick else sizes:
        generator = torch.Generator(device).manual_seed(0)
        q, kv, wide = (
            torch.randn(size, generator=generator, device=device).bfloat16()
            for size in ((t, heads, NOPE + ROPE), (t, heads, NOPE + V), (t, 2112))
        )
        angles = torch.rand(t, ROPE // 2, generator=generator, device=device)
        entries = ways(q, kv, wide[:, -ROPE:], angles.cos(), angles.sin())
        composed = [name for name in entries if name.startswith("torch")]
        add_bandwidths(report, entries, f"T{t} H{heads}", arguments, runs, composed)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
