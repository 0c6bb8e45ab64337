"""The optimizer on the machine: updates bit for bit correctly rounded FP32, blocks those of the weight written beside.

A case is named as its kernels are in the compile table. Segments and shards begin and end anywhere, weights have short
blocks at both edges. Blocks read weights that other warps wrote, so they also run by random schedules, in which a warp
may be far ahead of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, Fp8Tensor, scale_shape
from fp8moe.kernels.segments import PART, Segments
from tests.kernels.updates import SETTINGS, state, update_exactly
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import DTYPES, Case, assert_equal, ops

SCHEDULES = (None, 0, 1)


def flat(machine: Machine, moments: torch.dtype, has_weight: bool, beta1: float = 0.9) -> None:
    n = PART if machine.count else 2 * PART + 77
    spans = [(0, n, True)] if machine.count else [(3, 700, True), (700, 703, False), (703, n - 5, True)]
    for a, b in ((0, n),) if machine.count else ((0, n), (0, 701), (PART + 2, n)):
        segments = Segments.of(spans, "cpu").within(a, b)
        tensors, weight, settings = state(b - a, moments=moments), None, {**SETTINGS, "beta1": beta1}
        if has_weight:
            weight = torch.full((b - a,), 7.0, dtype=torch.bfloat16)
        scale = torch.tensor(0.37)
        expected = tuple(tensors[i].clone() for i in (0, 2, 3))
        rounded = None if weight is None else weight.clone()
        for start, stop, decays in segments.spans:
            decay = settings["weight_decay"] if decays else 0.0
            part = [tensor[start:stop] for tensor in tensors]
            exact = update_exactly(*part, **{**settings, "weight_decay": decay}, grad_scale=scale)
            for target, value in zip(expected, exact, strict=True):
                target[start:stop] = value
            if rounded is not None:
                rounded[start:stop] = exact[0].to(torch.bfloat16)
        with on_machine(machine):
            ops("triton", "adamw").adamw_step(*tensors, segments, weight, **settings, grad_scale=scale)
        for got, wanted in zip((tensors[0], tensors[2], tensors[3]), expected, strict=True):
            assert_equal(got, wanted)
        if weight is not None:
            assert_equal(weight, rounded)


def weight_with_blocks(
    machine: Machine, moments: torch.dtype, shape: Any = (2, 144, 208), seeds: Any = SCHEDULES
) -> None:
    for seed in (None,) if machine.count else seeds:
        machine.seed = seed
        *leading, n, k = shape = (1, 128, 256) if machine.count else shape
        tensors = state(*shape, moments=moments)
        expected = update_exactly(*tensors, **SETTINGS)
        weight, blocks, transposed = torch.empty(shape, dtype=torch.bfloat16), empty(*shape), empty(*leading, k, n)
        with on_machine(machine):
            ops("triton", "adamw").adamw_step_quantize(*tensors, weight, blocks, transposed, **SETTINGS)
        assert_equal((tensors[0], tensors[2], tensors[3]), expected)
        assert_equal(weight, expected[0].to(torch.bfloat16))
        assert_equal((blocks, transposed), ops("reference", "quantize").quantize_blocks(weight))


def empty(*shape: int) -> Fp8Tensor:
    return Fp8Tensor(torch.empty(shape, dtype=E4M3), torch.empty(scale_shape(shape, BLOCK_TILE)), BLOCK_TILE)


def norm(machine: Machine) -> None:
    for n in (8192,) if machine.count else (1, 4095, 4096, 7 * 4096 + 5):
        x = torch.randn(n) * 10 ** torch.empty(n).uniform_(-6, 3)
        programs = 1024 if machine.count else 2  # each of two has more than one run
        with patch.object(ops("triton", "squared_norm"), "PROGRAMS", programs), on_machine(machine):
            got: Tensor = ops("triton", "squared_norm").squared_norm(x)
        exact = float(x.double().square().sum())
        assert abs(float(got) - exact) <= 1e-13 * exact, f"{float(got)} is not {exact}"


def cases() -> Iterator[Case]:
    """Every kernel of the update."""
    for moments, kind in DTYPES:
        label = f"{kind} moments"
        yield f"triton adamw_step {label}", partial(flat, moments=moments, has_weight=True)
        yield f"triton adamw_step {label} no weight", partial(flat, moments=moments, has_weight=False)
        yield f"triton adamw_step_quantize {label}", partial(weight_with_blocks, moments=moments)
    from_grad = partial(flat, moments=torch.bfloat16, has_weight=False, beta1=0.3)
    yield "triton adamw_step from the gradient", from_grad
    yield "triton squared_norm", norm
