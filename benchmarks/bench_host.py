"""Host time of a layer: how long Python, autograd and Triton take to launch its kernels, whatever these take.

    python -m benchmarks.bench_host [--profile 30] [--json FILE]

A layer is bound by its host where the device waits for launches: DeepSeek-V2-Lite's mixture at 4,096 tokens has 6 ms
for about 90 launches (`bench_layer`), 70 microseconds each. On a GPU the layer has its real size, and a call is timed
until it returns, before the device has finished. Without one the same launchers run on a GPU that is pretended
(`pretended_gpu`), on a layer of the same structure whose sizes are small, since none of this depends on them.

Layers whose ranks share experts launch messages as well: `messages` is a dispatch, its combine and their backwards, of
fixed sizes, as one rank of eight has them, by messages that are not sent (`unsent_messages`).

`beside`: a message of MESSAGE products is started, PRODUCTS follow, and it is waited for: launched by whoever starts it
(`parallel.device_stream`), and by a thread in its place, which was refused.

Launches of the pretended GPU are Triton's and PyTorch's, each op that computes counted as one. The measure is
the fastest of many calls: other processes on the machine only ever add. --profile prints the functions
with the most time of their own, profiler's overhead included.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_layer import PRECISIONS
from benchmarks.harness import Report, make_parser, parse_arguments
from benchmarks.kernel_shares import shares
from benchmarks.layers import DSV2_LITE, LayerStep
from benchmarks.pretended_gpu import pretended_gpu
from benchmarks.unsent_messages import FourMessages, one_hop, two_hops, unsent_messages
from fp8moe.kernels.device_layout import empty_blocks, empty_rows
from fp8moe.kernels.gemm import gemm
from fp8moe.layers.attention import MlaConfig
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.device_stream import DeviceStream
from fp8moe.parallel.stream import HostStream, Stream

NAME, TOKENS = "dsv2_lite", {"cuda": 4096, "cpu": 16}
SMALL = replace(  # heads of one size: a CPU's attention is then one op, as a GPU's is
    DSV2_LITE,
    dim=128,
    attention=MlaConfig(num_heads=2, kv_lora_rank=64, nope_dim=32, rope_dim=16, v_dim=48),
    experts=replace(DSV2_LITE.experts, num_experts=8, hidden=64),
)
PRODUCTS, MESSAGE = 60, 20  # of FP8, small
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")


class _Counter(TorchDispatchMode):
    """Counts PyTorch's ops that compute: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not views and func.overloadpacket.__name__ not in ALLOCATIONS
        return func(*args, **(kwargs or {}))


def host_seconds(step: Callable[[], object], device: torch.device, *, repeats: int, warmup: int) -> list[float]:
    """Seconds until each of `repeats` calls returns; the device is idle when it begins.

    Of the pretended GPU, whose backward runs in this thread, seconds that the thread computed.
    """
    seconds, clock = [], time.perf_counter if device.type == "cuda" else time.thread_time
    for call in range(warmup + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        step()
        if call >= warmup:
            seconds.append(clock() - start)
    return seconds


def messages(config: ModelConfig, tokens: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The messages of such a layer by precision and number of hops."""
    return {
        f"messages {kind}{hops}": FourMessages(
            route(config.experts.num_experts), tokens, config.dim, config.router.topk, device, fp8=kind == "fp8"
        )
        for kind in PRECISIONS
        for hops, route in (("", one_hop), (", two hops", two_hops))
    }


@contextmanager
def layers(device: torch.device) -> Iterator[tuple[dict[str, Callable[[], object]], Callable[[Any], int]]]:
    """The layer and its messages by precision, and what counts the launches; on a CPU by a pretended GPU."""
    config, tokens = DSV2_LITE if device.type == "cuda" else SMALL, TOKENS[device.type]
    steps: dict[str, Callable[[], object]] = {
        f"{NAME} {kind}": LayerStep(config, precision, tokens, device) for kind, precision in PRECISIONS.items()
    }
    if device.type == "cuda":
        with unsent_messages():
            yield steps | messages(config, tokens, device), lambda step: shares(step).launches
        return
    with pretended_gpu() as launches, unsent_messages():
        steps |= messages(config, tokens, device)

        def count(step: Callable[[], object]) -> int:
            launches.count = 0
            with _Counter() as counter:
                step()
            return launches.count + counter.count

        yield steps, count


def beside(device: torch.device, stream: Stream) -> Callable[[], float]:
    """A message of products beside others -> seconds from its start until it is launched; its time is the host's."""
    a, b = empty_rows(32, 256, device), empty_blocks((128, 256), device)

    def message() -> float:
        for _ in range(MESSAGE):
            gemm(a, b)
        return time.perf_counter()

    def step() -> float:
        start = time.perf_counter()
        pending = stream.start(message, lambda launched: launched - start)
        for _ in range(PRODUCTS):
            gemm(a, b)
        return pending.wait()

    return step


def report_beside(report: Report, device: torch.device, repeats: int) -> None:
    """Rows of `beside` for both ways, alternated: median seconds of the whole, and until the message is launched."""
    on_gpu = torch.device("cuda", 0)
    steps = {"in turn": beside(on_gpu, DeviceStream(on_gpu)), "by a thread": beside(on_gpu, HostStream())}
    whole: dict[str, list[float]] = {name: [] for name in steps}
    launched: dict[str, list[float]] = {name: [] for name in steps}
    for call in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            until = step()
            if call:
                launched[name].append(until)
                whole[name].append(time.perf_counter() - start)
    shape = f"{PRODUCTS}+{MESSAGE}"
    for name in steps:
        for metric, seconds in (("host time", whole[name]), ("message launched", launched[name])):
            report.add(f"message {name}", shape, metric, statistics.median(seconds) * 1e3, "ms")


def profiled(step: Callable[[], object], calls: int, lines: int) -> None:
    """Print the `lines` functions with the most time of their own in `calls` calls."""
    profile = cProfile.Profile()
    with profile:
        for _ in range(calls):
            step()
    pstats.Stats(profile).sort_stats("tottime").print_stats(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Host time of a layer's launches", repeats=200, warmup=10)
    parser.add_argument("--profile", type=int, metavar="N", help="print the N functions with the most time")
    arguments = parse_arguments(parser, argv)
    device: torch.device = arguments.device
    report = Report(device, json_path=arguments.json)
    with layers(device) as (steps, count):
        for name, step in steps.items():
            seconds = host_seconds(step, device, repeats=arguments.repeats, warmup=arguments.warmup)
            number, best = count(step), min(seconds)
            shape = f"T{TOKENS[device.type]}"
            report.add(name, shape, "host time", best * 1e3, "ms")
            report.add(name, shape, "launches", number, "kernels")
            report.add(name, shape, "host time a launch", best * 1e6 / number, "us")
            if arguments.profile:
                profiled(step, arguments.repeats, arguments.profile)
        report_beside(report, device, arguments.repeats)
    report.finish()


if __name__ == "__main__":
    main()
