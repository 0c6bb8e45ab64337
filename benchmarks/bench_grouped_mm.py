"""BF16 products of the experts, and their weight gradients added into FP32: TFLOPS beside PyTorch's grouped GEMM.

    python -m benchmarks.bench_grouped_mm [--quick] [--tiles] [--json FILE]

The peer of the forward is `torch.nn.functional.grouped_mm` as it is, which leaves rows of nobody unwritten; that of a
weight gradient is the same function by tokens, which writes BF16 and adds nothing, or for one group `torch.mm`: less
work than ours. With --tiles the weight gradients run with each tile worth trying, to choose those of `tiles.json`.
A name begins with the back end that ran; on a CPU that is the reference, whose figures say nothing about a GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contest import write_beside
from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from fp8moe.kernels import backend, tiles
from fp8moe.kernels.gemm import wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.tiles import Tile

PEER = "torch bf16"
# Experts, tokens of each, outputs, inputs: both weights of 32 and of 4 experts of DeepSeek-V3; one group: the head.
SIZES = {
    "cuda": (
        (32, 1024, 4096, 7168), (32, 1024, 7168, 2048), (4, 8192, 4096, 7168), (4, 8192, 7168, 2048),
        (1, 4096, 129280, 7168), (1, 4096, 7168, 16384),
    ),
    "cpu": ((4, 64, 128, 256), (1, 256, 128, 256)),
}  # fmt: skip
# Columns, stages, warps by back end: those whose weight gradients have tiles.
SHAPES = {
    "triton": ((256, 4, 8), (256, 3, 8), (128, 3, 8), (128, 3, 4), (128, 4, 8)),
    "gluon": ((256, 3, 4), (256, 4, 4), (128, 4, 4), (128, 6, 4)),
}
CANDIDATES = {
    runs: tuple(Tile(128, width, stages, group, warps) for width, stages, warps in shapes for group in (4, 8, 16))
    for runs, shapes in SHAPES.items()
}


def products(
    e: int, t: int, n: int, k: int, device: torch.device, *, searched: bool
) -> dict[str, dict[str, Callable[[], object]]]:
    """Op -> candidate -> call, for e groups of t tokens and weights [n, k]."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    x, dy, total = normal(e * t, k), normal(e * t, n), torch.zeros(e, n, k, device=device)
    offsets = torch.arange(e + 1, dtype=torch.int32, device=device) * t
    ours: Callable[[], object] = partial(grouped_mm_wgrad, dy, x, offsets, total)
    by_groups = torch.nn.functional.grouped_mm
    peer: Callable[[], object] = lambda: by_groups(dy.t(), x, offs=offsets[1:])  # noqa: E731
    name = "grouped_mm_wgrad"
    if e == 1:
        name, ours, peer = "wgrad", partial(wgrad, dy, x, total[0]), lambda: torch.mm(dy.t(), x)
    runs = backend.provider(name, backend.resolve(device))
    found = {name: {PEER: peer, f"{runs} {name}": ours}}
    if searched:
        found[name] |= {f"{runs} {name} {named(tile)}": with_tile(tile, ours) for tile in CANDIDATES.get(runs, ())}
    if e > 1:
        w = normal(e, n, k)
        for op, a, b in (("grouped_mm", x, w), ("grouped_mm dgrad", dy, w.mT)):
            found[op] = {
                PEER: partial(by_groups, a, b.mT, offs=offsets[1:]),
                f"{runs} {op}": partial(grouped_mm, a, b, offsets),
            }
    return found


def named(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.stages} group {tile.group} warps {tile.warps}"


def with_tile(tile: Tile, call: Callable[[], object]) -> Callable[[], object]:
    """The call as if the table had chosen `tile`, which a launcher otherwise remembers for a size."""

    from fp8moe.kernels.triton import gemm as choice  # a machine without Triton measures the reference

    def run() -> object:
        choice.choose_tile.cache_clear()
        with patch.object(tiles, "choose", lambda *_, **__: tile):
            return call()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = make_parser("BF16 products of experts: TFLOPS beside PyTorch's grouped GEMM")
    parser.add_argument("--tiles", action="store_true", help="weight gradients with every tile worth trying")
    arguments = parse_arguments(parser, argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    sizes = SIZES[device.type]
    for e, t, n, k in sizes[:1] if arguments.quick else sizes:
        for op, calls in products(e, t, n, k, device, searched=arguments.tiles).items():
            seconds = alternate(calls, device, trials=arguments.repeats, warmup=arguments.warmup)
            for name, times in seconds.items():
                tflops = 2 * e * t * n * k / summarize(times).median / 1e12
                beside = PEER if name != PEER else None
                ratio = 1 / paired_ratio(times, seconds[PEER]) if beside else None
                label, shown = f"E{e} T{t} N{n} K{k}", name if beside else f"{op} {name}"
                report.add(shown, label, "throughput", tflops, "TFLOPS", baseline=beside, ratio=ratio)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
