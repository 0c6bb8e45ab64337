"""Casts, packing and permutation on the machine: each kernel bit for bit the specification, ragged edges included.

A case is named as its kernels are in the compile table (`tests/kernels/sm90_cases`). Values reach from subnormal
codes to saturation and hold zeros of both signs, infinities and NaN; every size but one has a short last tile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor
from fp8moe.kernels.message_layout import MessageLayout
from fp8moe.kernels.row_map import RowMap
from tests.kernels.row_maps import PARTS, random_ids
from tests.ptx.launching import Machine, on_machine

Case = tuple[str, Callable[[Machine], None]]
DTYPES = ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
CASTS = ("quantize_rows", "quantize_columns", "quantize_rows_and_columns", "quantize_blocks")
EXPERTS, TOPK = 12, 3
ALIGNED = ((128, 256),)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ops(backend: str, module: str) -> Any:
    return importlib.import_module(f"fp8moe.kernels.{backend}.{module}")


def bits(value: Any) -> list[Tensor]:
    """What a result is made of, as integers; codes under a scale that is not finite count as zero: any will do."""
    if value is None:
        return []
    if isinstance(value, tuple):
        return [part for one in value for part in bits(one)]
    if isinstance(value, RowMap):
        return [getattr(value, part) for part in PARTS]
    if isinstance(value, Tensor):
        return [value.contiguous().view(INTEGERS[value.element_size()])]
    codes, scale = value.data.contiguous(), value.scale.contiguous()
    codes = codes.view(INTEGERS[codes.element_size()]).clone()
    codes = torch.where(scale_of_each(value).isfinite(), codes, 0)
    return [codes, torch.where(scale.isnan(), float("nan"), scale).view(torch.int32)]


def scale_of_each(tensor: Fp8Tensor | E5m6Tensor) -> Tensor:
    """The scale of every code, or of every word of codes."""
    tile = tensor.tile if isinstance(tensor, Fp8Tensor) else (1, TILE // E5M6_VALUES * E5M6_WORDS)
    scale = tensor.scale
    for dim, size in ((-2, tile[0]), (-1, tile[1])):
        scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, tensor.data.shape[dim])
    return scale


def assert_equal(got: Any, expected: Any) -> None:
    for one, other in zip(bits(got), bits(expected), strict=True):
        assert one.shape == other.shape, f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
        wrong = int((one != other).sum())
        assert wrong == 0, f"{wrong} of {one.numel()} numbers differ from the specification"


def values(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, with every special value."""
    x = torch.randn(m, k) * torch.logspace(-9, 6, k)[torch.randperm(k)]
    x[1, :4] = torch.tensor([0.0, -0.0, 1e-42, -3e38])
    x[m // 2, 5:7] = torch.tensor([float("inf"), float("nan")])
    x[m - 1] = 0
    return x.to(dtype)


def both(machine: Machine, module: str, name: str, *args: Any, **kwargs: Any) -> None:
    """The machine's result is the specification's."""
    with on_machine(machine):
        got = getattr(ops("triton", module), name)(*args, **kwargs)
    assert_equal(got, getattr(ops("reference", module), name)(*args, **kwargs))


def shapes(machine: Machine, *ragged: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Ragged sizes, or where accesses are counted aligned ones."""
    return ALIGNED if machine.count else ragged


def cast(machine: Machine, name: str, dtype: torch.dtype, power_of_two: bool) -> None:
    for m, k in shapes(machine, (144, 208), (128, 16)):
        x = values(m, k, dtype)
        if name == "quantize_blocks":
            x = torch.stack([x, 3 * x.flip(0)])
        both(machine, "quantize", name, x, power_of_two=power_of_two)


def requantize(machine: Machine) -> None:
    for power_of_two in (False, True):
        ((m, k),) = shapes(machine, (144, 208))
        rows = ops("reference", "quantize").quantize_rows(values(m, k, torch.bfloat16), power_of_two=power_of_two)
        both(machine, "quantize", "requantize_columns", rows)


def pack(machine: Machine) -> None:
    for dtype, _ in DTYPES[:1] if machine.count else DTYPES:
        ((m, k),) = shapes(machine, (72, 208))
        both(machine, "e5m6", "pack_e5m6", values(m, k, dtype))


def unpack(machine: Machine) -> None:
    ((m, k),) = shapes(machine, (144, 208))
    x = values(m, k, torch.bfloat16).nan_to_num()
    packed = ops("reference", "e5m6").pack_e5m6(x)
    for dtype, _ in DTYPES[:1] if machine.count else DTYPES:
        both(machine, "e5m6", "unpack_e5m6", packed, dtype=dtype)
    both(machine, "e5m6", "e5m6_to_columns", packed)
    both(machine, "e5m6", "pack_e5m6", x if machine.count else values(40, 16, torch.bfloat16))


def some_map(align: int = 16) -> RowMap:
    return ops("reference", "permute").plan_rows(random_ids(60, TOPK, EXPERTS, 0.2), EXPERTS, align=align)


def plan(machine: Machine) -> None:
    for n, experts, align, room in ((60, EXPERTS, 16, None), (37, 70, 8, 90)):
        ids = random_ids(n, TOPK, experts, 0.2)
        scanned = ops("triton", "permute").PLAN_BLOCKS if machine.count else 2  # at once; few blocks take two goes
        with patch.object(ops("triton", "permute"), "PLAN_BLOCKS", scanned):
            both(machine, "permute", "plan_rows", ids, experts, align=align, room=room)


def permute(machine: Machine, kind: str) -> None:
    width = 576 if "K576" in kind else shapes(machine, (60, 208))[0][1]
    x: Any = torch.randn(60, width)
    if kind.startswith("fp8"):
        x = ops("reference", "quantize").quantize_rows(x)
        x = Fp8Tensor(x.data, x.scale.contiguous() if "token-major" in kind else x.scale.mT.contiguous().mT)
    elif kind == "bf16":
        x = x.to(torch.bfloat16)
    both(machine, "permute", "permute", x, some_map())


def unpermute(machine: Machine, dtype: torch.dtype) -> None:
    row_map = some_map()
    width = shapes(machine, (60, 208))[0][1]
    y = torch.randn(row_map.slot_R.shape[0], width).to(dtype)
    both(machine, "permute", "unpermute", y, row_map)
    if not machine.count:  # where no access is of 16 bytes
        out = torch.zeros(60, width + 9, dtype=dtype)[:, 1 : 1 + width]
        with on_machine(machine):
            ops("triton", "permute").unpermute(y, row_map, out=out)
        assert_equal(out, ops("reference", "permute").unpermute(y, row_map))


def permute_quantize(machine: Machine, dtype: torch.dtype, power_of_two: bool) -> None:
    width = shapes(machine, (60, 208))[0][1]
    both(machine, "permute", "permute_quantize", values(60, width, dtype), some_map(), power_of_two=power_of_two)


def plan_message(machine: Machine, of_message: bool) -> None:
    """Ids as they were chosen and as they arrived, for fixed rooms that some peers overflow and for exact ones."""
    ids = random_ids(60, TOPK, EXPERTS, 0.2)
    given = ~ids.to(torch.int16) if of_message else ids
    if machine.count:
        both(machine, "message", "plan_message", given, 4, 3, room=160, fixed=not of_message)
        return
    for peers, span, first, room, fixed in ((4, 3, 0, 88, True), (2, 3, 4, 70, False), (70, 1, 0, 140, True)):
        both(machine, "message", "plan_message", given, peers, span, room=room, first=first, fixed=fixed)


def plan_received(machine: Machine) -> None:
    ids = ~random_ids(60, TOPK, EXPERTS, 0.2).to(torch.int16)
    order = torch.randperm(60)
    for first, align, room in ((4, 16, 128), (-1, 8, 60)):
        both(machine, "permute", "plan_rows", ids, 6, align=align, room=room, first=first, order=order)


def message(machine: Machine, kind: str, unpacks: bool) -> None:
    """Packed by a map with padding, or unpacked by one: with ids and without, scales that are not finite too."""
    width = 576 if "K576" in kind else shapes(machine, (60, 208))[0][1]
    x: Any = torch.randn(60, width).to(torch.bfloat16)
    if kind.startswith("fp8"):
        x = ops("reference", "quantize").quantize_rows(x, power_of_two=True)
        x.scale[7, 0], x.scale[9, 0] = float("nan"), float("inf")
        x = Fp8Tensor(x.data, x.scale.mT.contiguous().mT)
    ids, weights = random_ids(60, TOPK, EXPERTS, 0.2), torch.rand(60, TOPK)
    travelling = () if "without" in kind else (ids, weights)
    to_peers = ops("reference", "message").plan_message(ids, 4, 3, room=160, fixed=True)
    if not unpacks:
        both(machine, "message", "pack_message", x, to_peers, *travelling, sender=3)
        return
    packed = ops("reference", "message").pack_message(x, to_peers, *travelling, sender=3)
    layout = MessageLayout.of(x, TOPK if travelling else 0)
    arrived = random_ids(160, TOPK, 6, 0.4)
    both(
        machine,
        "message",
        "unpack_message",
        packed,
        ops("reference", "permute").plan_rows(arrived, 6, align=16),
        layout,
    )


def cases() -> Iterator[Case]:
    """Every kernel that moves or casts."""
    for dtype, kind in DTYPES:
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            for name in CASTS:
                yield f"triton {name} {label}", partial(cast, name=name, dtype=dtype, power_of_two=power_of_two)
            yield (
                f"triton permute_quantize {label}",
                partial(permute_quantize, dtype=dtype, power_of_two=power_of_two),
            )
        yield f"triton unpermute {kind}", partial(unpermute, dtype=dtype)
    for kind in ("bf16", "fp32", "fp8", "fp8 token-major", "fp8 K576"):
        yield f"triton permute {kind}", partial(permute, kind=kind)
    yield "triton requantize_columns", requantize
    yield "triton pack_e5m6 bf16", pack
    yield "triton e5m6", unpack
    yield "triton plan_rows", plan
    yield "triton plan_rows of a message", plan_received
    yield "triton plan_message", partial(plan_message, of_message=False)
    yield "triton plan_message of a message", partial(plan_message, of_message=True)
    for kind in ("fp8", "fp8 K576", "bf16"):
        for carried in ("", " without ids"):
            yield f"triton pack_message {kind}{carried}", partial(message, kind=kind + carried, unpacks=False)
            yield f"triton unpack_message {kind}{carried}", partial(message, kind=kind + carried, unpacks=True)
