"""RMSNorm and RoPE on the machine: what is exact bit for bit, sums within the rounding of their order.

A case is named as its kernels are in the compile table (`tests/kernels/sm90_cases`); widths are smaller here. A sum of
squares has the device's order, so 1/rms may differ by its last bits from the specification's; y, rows and columns must
be exactly those of the 1/rms that the machine found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import DTYPES, assert_equal, both, ops

Case = tuple[str, Callable[[Machine], None]]
EPS = 1e-6
SHARED_OUT = {1536: 70, 512: 20, 128: 40}  # rows of a width at which a program has more than one block of them
WRITTEN: dict[str, tuple[bool, dict[str, bool]]] = {  # what stands in the table: with a residual, asked for
    "residual tensor and rows pow2": (True, {"rows": True, "power_of_two": True}),
    "tensor": (False, {}),
    "tensor of heads D128": (False, {}),
    "rows": (False, {"tensor": False, "rows": True}),
    "rows of a latent D1536": (False, {"tensor": False, "rows": True}),
    "rows of a latent D512": (False, {"tensor": False, "rows": True}),
    "residual tensor and rows D16384": (True, {"rows": True}),
}


def size(machine: Machine, label: str, ragged: tuple[int, int], aligned: tuple[int, int]) -> tuple[int, int]:
    """Rows and width: a width of the table where one is named, else ragged, or aligned where accesses are counted."""
    width = int(label.rpartition(" D")[2]) if " D" in label else 0
    rows, other = aligned if machine.count else ragged
    return (2 if width > 8192 else 4, width) if width else (rows, other)


def operands(rows: int, width: int, dtype: torch.dtype, label: str) -> tuple[Tensor, Tensor]:
    """x [rows, width] of very different rows, with zeros, a row of zeros and a NaN, and a gain."""
    x = (torch.randn(rows, width) * torch.logspace(-3, 2, rows)[:, None]).to(dtype)
    x[0, :2], x[rows - 1] = torch.tensor([0.0, -0.0]).to(dtype), 0
    if rows > 8:
        x[5, 3] = float("nan")
    if "latent" in label:
        wide = torch.full((rows, width + 64), float("nan"), dtype=dtype)
        wide[:, 32 : 32 + width] = x
        x = wide[:, 32 : 32 + width]
    return x, torch.randn(width).to(dtype)


def forward(machine: Machine, label: str, dtype: torch.dtype) -> None:
    residual, asked = WRITTEN[label]
    x, weight = operands(*size(machine, label, (13, 208), (16, 512)), dtype, label)
    delta = torch.randn(x.shape).to(dtype) if residual else None
    with on_machine(machine):
        h, y, q, inverse = ops("triton", "norm").rms_norm(x, weight, delta, eps=EPS, **asked)
    expected_h, _, _, expected = ops("reference", "norm").rms_norm(x, weight, delta, eps=EPS)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert_equal(h.nan_to_num(7), expected_h.nan_to_num(7))
    source = x if delta is None else h
    normed = (source.float() * inverse[:, None]).mul_(weight).to(dtype)
    if asked.get("tensor", True):
        assert_equal(y.nan_to_num(7), normed.nan_to_num(7))
    if asked.get("rows"):
        power_of_two = asked.get("power_of_two", False)
        assert_equal(q, ops("reference", "quantize").quantize_rows(normed, power_of_two=power_of_two))
    if asked.get("power_of_two") and dtype is torch.bfloat16 and not machine.count:
        of_the_stored_inverse(machine)


def sensitive_gain(h: Tensor, inverse: Tensor) -> tuple[Tensor, int]:
    """For each feature the BF16 gain that brings y of a row nearest to where BF16 rounds up; how many touch it.

    Those are within a step of FP32 of it: a 1/rms off by its last bit rounds about half of them to the neighbour.
    """
    gains = (1 + torch.arange(128) / 128)[:, None, None]
    lower = ((h.float() * inverse[:, None]) * gains).view(torch.int32) & 0xFFFF  # what BF16 drops
    far, which = (lower - 0x8000).abs().flatten(0, 1).min(0)
    return gains.flatten()[which // len(h)].to(h.dtype), int((far <= 1).sum())


def of_the_stored_inverse(machine: Machine, rows: int = 32, width: int = 2112) -> None:
    """y and the codes of a forward, and columns made later, are of the 1/rms that it stored, to the last bit.

    A sixteenth of the values are large; squares of the others are lost one by one beside them, and count where they
    are added together first: a sum in another order is another sum.
    """
    large = torch.arange(width) % 16 == 0
    x, delta = (torch.where(large, 1, 1.2e-4) * (1 + torch.rand(2, rows, width)) / 4).to(torch.bfloat16)
    norm = ops("triton", "norm")
    with on_machine(machine):
        h, _, _, inverse = norm.rms_norm(x, torch.ones(width).to(x.dtype), delta, eps=EPS, rows=True)
    weight, near = sensitive_gain(h, inverse)
    assert near >= 2 * rows, "no value tells one 1/rms from the next"
    with on_machine(machine):
        h, y, q, again = norm.rms_norm(x, weight, delta, eps=EPS, rows=True)
        columns = norm.rms_norm_columns(h, weight, again)
    assert_equal(again, inverse)
    normed = (h.float() * inverse[:, None]).mul_(weight).to(h.dtype)
    assert_equal(y, normed)
    assert_equal(q, ops("reference", "quantize").quantize_rows(normed))
    assert_equal(columns, ops("reference", "quantize").quantize_columns(y))


def columns(machine: Machine, dtype: torch.dtype, power_of_two: bool) -> None:
    x, weight = operands(*((128, 256) if machine.count else (144, 208)), dtype, "latent")
    inverse = ops("reference", "norm").rms_norm(x, weight, eps=EPS)[3]
    both(machine, "norm", "rms_norm_columns", x, weight, inverse, power_of_two=power_of_two)


def backward(machine: Machine, label: str, dtype: torch.dtype) -> None:
    rows, width = size(machine, label, (40, 208), (16, 512))
    x, weight = operands(rows if machine.count else SHARED_OUT.get(width, rows), width, dtype, "latent")
    x = x.nan_to_num()
    dy, residual = torch.randn(2, *x.shape).to(dtype)
    given = (residual,) if "residual" in label else ()
    inverse = ops("reference", "norm").rms_norm(x, weight, eps=EPS)[3]
    ours, theirs = torch.ones(2, x.shape[1])
    programs = 256 if machine.count else 33 if width == 1536 else 1  # the gain's shares of 33 are added in two goes
    with patch.object(ops("triton", "norm"), "PROGRAMS", programs), on_machine(machine):
        got = ops("triton", "norm").rms_norm_backward(dy, x, weight, inverse, ours, *given)
    expected = ops("reference", "norm").rms_norm_backward(dy, x, weight, inverse, theirs, *given)
    scale = expected.float().abs().amax(-1, keepdim=True)
    bound = 2.0**-8 if dtype is torch.bfloat16 else 1e-5
    assert bool(((got.float() - expected.float()).abs() <= bound * scale).all()), "dx is off by more than a rounding"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def heads(machine: Machine, name: str, dtype: torch.dtype) -> None:
    """Few and many heads, a rotary part that is no power of two wide, and one that is the whole head."""
    for t, h, nope, half, v in (
        ((2, 40, 32, 16, 48), (3, 5, 16, 3, 16), (2, 6, 0, 8, 16)) if not machine.count else ((2, 32, 128, 32, 128),)
    ):
        angles = torch.randn(t, half), torch.randn(t, half)
        q, kv = torch.randn(t, h, nope + 2 * half).to(dtype), torch.randn(t, h, nope + v).to(dtype)
        k_rope = torch.randn(t, 2 * half + 16).to(dtype)[:, 16:]
        args: tuple[Any, ...] = (q, *angles)
        if name == "rope_keys":
            args = (kv, k_rope, *angles)
        if name != "rope_keys_backward":
            both(machine, "rope", name, *args, **({"nope_dim": nope} if name == "rope_keys" else {}))
            continue
        with on_machine(machine):
            d_kv, d_rope = ops("triton", "rope").rope_keys_backward(q, kv[..., nope:], *angles)
        expected_kv, expected_rope = ops("reference", "rope").rope_keys_backward(q, kv[..., nope:], *angles)
        assert_equal(d_kv, expected_kv)
        bound = {"rtol": 2.0**-7, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(d_rope, expected_rope, **bound)


def cases() -> Iterator[Case]:
    """Every kernel of both."""
    for dtype, kind in DTYPES:
        for label in WRITTEN:
            if dtype is torch.bfloat16 or not label.endswith("D16384"):
                yield f"triton rms_norm {kind} {label}", partial(forward, label=label, dtype=dtype)
        for label in ("", " residual", " D1536", " D512", " D128", *([" D16384"] if dtype is torch.bfloat16 else [])):
            yield f"triton rms_norm_backward {kind}{label}", partial(backward, label=label, dtype=dtype)
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            yield f"triton rms_norm_columns {label}", partial(columns, dtype=dtype, power_of_two=power_of_two)
        for name in ("rope_queries", "rope_queries_backward", "rope_keys", "rope_keys_backward"):
            yield f"triton {name} {kind}", partial(heads, name=name, dtype=dtype)
