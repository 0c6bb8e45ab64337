"""Device time of a call by kind of work: products, attention, casts, permutations, element-wise work, the rest.

A kind is told by the kernel's name under torch.profiler: Triton's and Gluon's kernels carry the name of their Python
function, a library's product or attention says so in its own. What no pattern knows is `other`, and `unknown` names it,
so that a table that has gone stale shows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name holds decides.
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"^reduce_splits_kernel|cudnn.*(sdpa|flash|attn)|fmha|flash|efficient_attention|attention"),
    ("cast", r"^(tiles|blocks|requantize|cast|pack|unpack|e5m6_columns)_kernel"),
    ("swiglu", r"^(swiglu|silu_mul|bias)\w*_kernel"),
    ("norm and rope", r"^(norm|gain|rotate_queries|make_keys|keys_backward)\w*_kernel|layer_norm|RMSNorm"),
    ("router", r"^(route|balance)\w*_kernel"),
    ("permutation", r"^(count|scan|place|peers|copy|sum|sum_runs|pack_message|unpack_message)_kernel"),
    ("optimizer", r"^(flat_step|blocks_step|partial|total)_kernel"),
    ("loss", r"^cross_entropy_kernel"),
    (
        "gemm",
        r"^(rows|columns|tokens|gemm|wgrad|exact_wgrad|zero_rows|grouped_\w+)_kernel|gemm|nvjet|cutlass|xmma|cublas"
        r"|splitK",
    ),
    ("element-wise", r"elementwise|reduce_kernel|CatArray|fill|index|scatter|gather|Memcpy|Memset|softmax"),
)
OTHER = "other"


@dataclass(frozen=True)
class Shares:
    """Of one call: seconds a kind, kernels launched (copies and fills included), names that no pattern knows."""

    seconds: Mapping[str, float]
    launches: int
    unknown: tuple[str, ...]

    @property
    def total(self) -> float:
        """Seconds of all kernels; those that ran at the same time count twice."""
        return sum(self.seconds.values())


def kind_of(kernel: str) -> str:
    """The kind of work of a kernel of that name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), OTHER)


def shares(call: Callable[[], object]) -> Shares:
    """Run `call` once under the profiler, on the current CUDA device; call it before, so that nothing compiles."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    ran = [(e.name, e.time_range.elapsed_us() / 1e6) for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return gathered(ran)


def gathered(ran: list[tuple[str, float]]) -> Shares:
    """The shares of kernels given as (name, seconds)."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, duration in ran:
        seconds[kind_of(name)] += duration
    unknown = tuple(sorted({name for name, _ in ran if kind_of(name) == OTHER}))
    return Shares(dict(sorted(seconds.items(), key=lambda item: -item[1])), len(ran), unknown)
