"""A whole mixture layer on the machine, forward, backward and weight gradients, in FP8 and in BF16.

Three things hold it. Each op's results are compared with the specification's on the operands that the layer gave it,
which lie as the layer lays them: views of wider tensors, rows behind the last expert's. The layer's own results are
compared with those of the same layer on a CPU by the reference back end; and both with what FP64 autograd makes of the
layer's definition, which would also show a mistake that all back ends share. Bounds follow from the formats:

Ops    What moves, casts or rotates gives equal bits, FP8 codes and scales among them. Where sums have an order of their
       own or an exponential is the GPU's, FP32 results are held to its rounding; a BF16 number or an FP8 code may then
       fall on the other side of a tie, which few do.
CPU    The same few ties. Before attention's backward that is all; into it comes the router's gradient, which a CPU
       multiplies in FP32 and a GPU as two BF16 parts: gradients rounded to BF16 behind it differ by some roundings, and
       of their FP8 codes those that lay near a tie.
FP64   Rounding to m bits of mantissa costs `rounding` of `calc_diff`. Behind the output lie those of some ten tensors,
       backward adds as many, and the softmax passes on more of queries and keys than it gets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E5m6Tensor, Fp8Tensor
from tests.distance import calc_diff
from tests.ptx.launching import Machine
from tests.ptx.layer_definition import defined
from tests.ptx.layer_machine import Watch, on_hopper
from tests.ptx.layer_step import EMPTY, Stepped, build, draw, step
from tests.ptx.moving_cases import INTEGERS

# Ops whose sums have an order of their own, or whose exponential is the GPU's; all others give equal bits.
ROUNDED = frozenset({
    "gemm", "grouped_gemm", "grouped_wgrad", "wgrad", "grouped_mm", "grouped_mm_wgrad", "rms_norm", "rms_norm_backward",
    "rope_keys_backward", "swiglu", "swiglu_columns", "swiglu_backward", "silu_mul", "silu_mul_backward", "route",
    "route_backward",
})  # fmt: skip
OP_BOUNDS = {torch.float32: 1e-12, torch.bfloat16: 5e-6, torch.float8_e4m3fn: 5e-6}  # of `calc_diff`
MANTISSA = {"fp8": 3, "bf16": 7}  # bits behind the leading one
# Roundings of the format behind a value, by the start of its name, the longest that fits.
ROUNDINGS = {"": 64, "output": 16, "balance loss": 16, "blocks.0.moe.experts": 32, "blocks.0.moe.shared": 32}
# Roundings that a GPU's layer may be away from a CPU's: of BF16 before the router's gradient, of the format behind it.
# Without the second of its parts that gradient would be off by one.
BEFORE_ROUTER = {"output": 1, "balance loss": 1, "blocks.0.moe": 1, "blocks.0.moe.router": 0.25}
BEHIND_ROUTER = {"fp8": 1, "bf16": 8}


def rounding(kind: str) -> float:
    """`calc_diff` of values of every size and their rounding in the format of `kind`.

    Between 1 and 2 the error is even within a step of 2^-m, its square step^2 / 12 on average, that of values 7 / 3.
    """
    return 4.0 ** -MANTISSA[kind] / 12 / (7 / 3) / 2


def parts(value: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors in what an op takes or gives: as they lie in memory, and as numbers."""
    if isinstance(value, Fp8Tensor | E5m6Tensor):
        yield value.data, value.dequantize() if isinstance(value, Fp8Tensor) else value.data
        yield value.scale, value.scale
    elif isinstance(value, Tensor):
        yield value, value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from parts(part)
    elif is_dataclass(value):
        yield from parts(tuple(vars(value).values()))


def difference(op: str, got: Any, expected: Any) -> str:
    """By what two results of an op differ more than they may; empty where they don't."""
    ours, theirs = list(parts(got)), list(parts(expected))
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors, not {len(theirs)}"
    for place, ((raw, number), (other_raw, other)) in enumerate(zip(ours, theirs, strict=True)):
        told = f"tensor {place}, {raw.dtype} {list(raw.shape)}"
        if (raw.shape, raw.dtype) != (other_raw.shape, other_raw.dtype):
            return f"{told} is not {other_raw.dtype} {list(other_raw.shape)}"
        integers = INTEGERS[raw.element_size()]
        wrong = int((raw.contiguous().view(integers) != other_raw.contiguous().view(integers)).sum())
        if wrong and (op not in ROUNDED or raw.dtype not in OP_BOUNDS):
            return f"{told}: {wrong} of {raw.numel()} numbers differ"
        if wrong and not (diff := calc_diff(number, other)) <= OP_BOUNDS[raw.dtype]:
            return f"{told}: calc_diff {diff:.1e} exceeds {OP_BOUNDS[raw.dtype]:.0e}"
    return ""


def beyond(got: Stepped, expected: Stepped, bounds: dict[str, float]) -> list[str]:
    """Values that lie further from the expected ones than the bound of their name."""
    found = []
    for name, value in got.values().items():
        bound = bounds[max((start for start in bounds if name.startswith(start)), key=len)]
        diff = calc_diff(value, expected.values()[name])
        if not diff <= bound:
            found.append(f"{name}: calc_diff {diff:.1e} exceeds {bound:.1e}")
    return found


def run_layer(kind: str, machine: Machine) -> dict[str, Any]:
    """What is wrong of the layer of a kind of RECIPES, in sentences, and the (phase, op, kernel) it launched."""
    start, watch, wrong = time.process_time(), Watch(), list[str]()
    machine.launched, machine.seed, machine.edit, machine.count = [], None, None, False

    def compare(place: str, op: str, got: Any, expected: Any) -> None:
        if told := difference(op, got, expected):
            wrong.append(f"{place}: {told}")

    try:
        layer, twin = build(kind, "cpu"), build(kind, "cpu")
        draw(layer)
        draw(twin)
        reference = step(twin, Watch())
        with on_hopper(machine, watch, compare):
            got = step(layer, watch)
        wrong += assess(kind, got, reference, defined(twin, reference.ids_TK))
    except Exception as failure:
        wrong.append(f"{type(failure).__name__}: {failure}")
    wrong += [f"{op} falls to the specification" for op in sorted(watch.undone)]
    seconds = round(time.process_time() - start, 2)
    return {"wrong": wrong, "launched": watch.launched, "seconds": seconds}


def assess(kind: str, got: Stepped, reference: Stepped, exact: Stepped) -> list[str]:
    """What is wrong of the layer's results."""
    loads, one = got.loads_E.tolist(), rounding(kind)
    wrong = [] if torch.equal(got.ids_TK, reference.ids_TK) else ["tokens go to other experts than on a CPU"]
    if loads != exact.loads_E.tolist() or [e for e, load in enumerate(loads) if load == 0] != [EMPTY]:
        wrong.append(f"loads {loads} are not {exact.loads_E.tolist()} with expert {EMPTY} alone empty")
    kept = [name for name, added in got.main_grads.items() if ".experts." in name and bool(added[EMPTY].any())]
    wrong += [f"{name}: the main_grad of an expert without tokens has changed" for name in kept]
    beside_cpu = {start: number * rounding("bf16") for start, number in BEFORE_ROUTER.items()}
    beside_cpu[""] = BEHIND_ROUTER[kind] * one
    wrong += [f"on a CPU {told}" for told in beyond(got, reference, beside_cpu)]
    for where, result in (("", got), ("of the reference ", reference)):
        bounds = {start: number * one for start, number in ROUNDINGS.items()}
        wrong += [f"in FP64 {where}{told}" for told in beyond(result, exact, bounds)]
    return wrong


def report(kind: str, machine: Machine) -> dict[str, Any]:
    """`run_layer`'s report, printed as well."""
    found = run_layer(kind, machine)
    told = "\n    ".join(found["wrong"]) or "right"
    print(f"whole layer, {kind}: {len(found['launched'])} launches, {found['seconds']} s: {told}", flush=True)
    return found
