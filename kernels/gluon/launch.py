"""From checked operands to a launch: descriptors, scales in the layout the kernels read, and how many SMs may work.

Descriptors are made on the host: they travel as kernel arguments, and the device needs no scratch memory and no fence
for them. A kernel runs one program an SM, on as many as it may take (`backend.limit_sms`).

A tile with `multicast` runs a pair of CTAs a program and half as many programs. The table of tiles has such tiles, and
`pairs_allowed` says whether they may be chosen: from Triton 3.8 on, if FP8MOE_PAIRS=1. On an H100 they change no bit
and gain nothing (0.98 to 1.01 of the same tile alone; benchmarks/LOG.md), so that they are not the default.

Operands that already lie well are used in place: K-major codes on 16-byte rows, scales at stride 1 along M. Anything
else is copied first, which costs a pass over it: whoever quantizes for these kernels writes the right layout.
"""

import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8moe.kernels import backend, tiles
from fp8moe.kernels.fp8 import TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.gluon.columns_kernel import columns_kernel
from fp8moe.kernels.gluon.pipeline import ADD, ADD_TMA, STORE, STORE_TMA
from fp8moe.kernels.gluon.rows_kernel import rows_kernel
from fp8moe.kernels.tiles import ADDED_BY_TMA, DEFAULT_DEVICE, HOPPER_SMS, PAIR, Tile

TMA_ALIGNMENT = 16
WAVE_ROWS, ADDED_COLUMNS = TILE // 2, 32
WHOLE, SPLIT = 0, 1  # what each CTA of a pair has of a dim: all of it, or its half

OLDEST_MULTICAST = (3, 8)  # of Triton: before it an arrival can't reach another CTA's barrier (see `pipeline`)
PAIRS_VARIABLE = "FP8MOE_PAIRS"


def pairs_allowed() -> bool:
    """Whether pairs of CTAs may be chosen: this Triton has them and FP8MOE_PAIRS is 1."""
    return backend.release_of(triton.__version__) >= OLDEST_MULTICAST and os.environ.get(PAIRS_VARIABLE) == "1"


def num_sms(device: torch.device) -> int:
    """SMs that a GEMM may use on `device`."""
    return backend.allowed_sms(_properties(device)[1])


def choose_tile(op: str, m: int, n: int, k: int, device: torch.device, groups: int = 1) -> Tile:
    """The table's tile for `op` on the SMs that it may use now, of a pair of CTAs where that is cheaper and allowed."""
    return tiles.choose(
        "gluon", op, m, n, k, groups=groups, device=device_name(device), sms=num_sms(device), pairs=pairs_allowed()
    )


def typical_rows(rows: int, groups: int) -> int:
    """A group's rows on average, up to a power of two: batches of about one size take one tile and compile it once."""
    return 1 << (ceil_div(rows, groups) - 1).bit_length()


def device_name(device: torch.device) -> str:
    """The name of the GPU, as the table of tiles keys it."""
    return _properties(device)[0]


@functools.cache
def _properties(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":  # operands of a launch that is compiled and not run
        return DEFAULT_DEVICE, HOPPER_SMS
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def launch_rows(
    a: Fp8Tensor,
    b: Fp8Tensor,
    out: Tensor,
    *,
    tile: Tile,
    sms: int,
    group_offsets: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out [M, N] = or += a rows [M, K] @ b blocks [N, K]^T, or [E, N, K] with offsets; no size may be zero."""
    m, k = a.shape
    n, grouped = b.shape[-2], group_offsets is not None
    assert not (grouped and tile.block_m != TILE), "a taller tile could straddle two experts"
    epilogue = ADD.value if accumulate else STORE_TMA.value if out.dtype is torch.bfloat16 else STORE.value
    scale = _m_major(a.scale)
    ctas = _ctas(tile)
    c: TensorDescriptor | Tensor = out
    if epilogue == STORE_TMA.value:
        layout = _layout(16, 128, ctas, WHOLE, SPLIT)
        c = TensorDescriptor(out, [m, n], [out.stride(0), 1], [64, TILE * ctas], layout)
    num_tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n * ctas)
    with torch.cuda.device_of(out):
        rows_kernel[(min(max(1, sms // ctas), num_tiles),)](
            _codes(a.data, _rows(tile), ctas, WHOLE),
            _codes(b.data.reshape(-1, k), _columns(tile), ctas, SPLIT),
            c,
            scale,
            b.scale.contiguous(),
            group_offsets,
            m,
            n,
            k,
            b.shape[0] if grouped else 1,
            scale.stride(1),
            out.stride(0),
            **_constants(tile, grouped, epilogue),
        )


def launch_columns(
    a: Fp8Tensor,
    b: Fp8Tensor,
    out: Tensor,
    *,
    tile: Tile,
    sms: int,
    group_offsets: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out [N, K] (or [E, N, K] with offsets) = or += a columns [N, T] @ b columns [K, T]^T; no size may be zero."""
    (n, t), k, grouped = a.shape, b.shape[0], group_offsets is not None
    num_groups = out.shape[0] if grouped else 1
    ctas = _ctas(tile)
    num_tiles = num_groups * ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n * ctas)
    epilogue = ADD.value if accumulate else STORE.value
    c: TensorDescriptor | Tensor = out
    if accumulate and _can_add_by_tma(out, t // num_groups, ctas):
        epilogue, rows = ADD_TMA.value, out.view(-1, k)
        layout = _layout(32, 128, ctas, WHOLE, WHOLE)
        c = TensorDescriptor(rows, list(rows.shape), [k, 1], [WAVE_ROWS, ADDED_COLUMNS], layout)
    with torch.cuda.device_of(out):
        columns_kernel[(min(max(1, sms // ctas), num_tiles),)](
            _codes(a.data, _rows(tile), ctas, WHOLE),
            _codes(b.data, _columns(tile), ctas, SPLIT),
            _scales(a.scale, _rows(tile), ctas, WHOLE),
            _scales(b.scale, _columns(tile), ctas, SPLIT),
            c,
            group_offsets,
            num_groups,
            n,
            k,
            t,
            out.stride(-2),
            **_constants(tile, grouped, epilogue),
        )


def _can_add_by_tma(out: Tensor, tokens: int, ctas: int) -> bool:
    """Whether TMA may add tiles into out [N, K] or [E, N, K], and is the faster way to.

    It needs rows of multiples of 16 bytes, and no wave of 64 rows may reach into the next expert's.
    """
    whole = out.dim() == 2 or out.shape[1] % WAVE_ROWS == 0
    aligned = out.is_contiguous() and out.shape[-1] % 4 == 0 and out.data_ptr() % TMA_ALIGNMENT == 0
    return tokens >= ADDED_BY_TMA and ctas == 1 and whole and aligned


def _constants(tile: Tile, grouped: bool, epilogue: int) -> dict[str, Any]:
    return {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "STAGES": tile.stages,
        "GROUP": tile.group,
        "GROUPED": grouped,
        "EPILOGUE": epilogue,
        "CTAS": _ctas(tile),
        "num_ctas": _ctas(tile),
        "num_warps": tile.warps,
    }


def _ctas(tile: Tile) -> int:
    """CTAs that share their rows by multicast, each with its own columns. ValueError where Triton can't do it."""
    if tile.multicast and backend.release_of(triton.__version__) < OLDEST_MULTICAST:
        raise ValueError(
            f"a tile with multicast needs Triton {'.'.join(map(str, OLDEST_MULTICAST))} or newer, this is "
            f"{triton.__version__}: take a tile without"
        )
    return PAIR if tile.multicast else 1


def _rows(tile: Tile) -> int:
    """Rows that one TMA load brings: a tile's; of a pair 64, because a tile that two CTAs share can't be sliced."""
    return TILE // 2 if tile.multicast else tile.block_m


def _columns(tile: Tile) -> int:
    """Columns that one TMA load brings: a tile's; of a pair 128 each, so that each half is one CTA's."""
    return PAIR * TILE if tile.multicast else tile.block_n


@functools.cache
def _layout(bits: int, swizzle: int, ctas: int, *halves: int) -> gl.NVMMASharedLayout:
    """Shared memory for TMA; `halves`: for each dim WHOLE or SPLIT, where there is a pair."""
    pair = {"cga_layout": [list(halves)]} if ctas == PAIR else {}
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(halves), **pair)


def _codes(data: Tensor, block_rows: int, ctas: int, rows: int) -> TensorDescriptor:
    """A descriptor of K-major codes [M, K] for tiles of block_rows x 128."""
    if data.stride(1) != 1 or data.stride(0) % TMA_ALIGNMENT or data.data_ptr() % TMA_ALIGNMENT:
        data = data.contiguous()
    return TensorDescriptor(
        data, list(data.shape), [data.stride(0), 1], [block_rows, TILE], _layout(8, 128, ctas, rows, WHOLE)
    )


def _m_major(scale: Tensor) -> Tensor:
    """Scales [M, K/128] at stride 1 along M."""
    return scale if scale.stride(0) == 1 else scale.mT.contiguous().mT


def _scales(scale: Tensor, block: int, ctas: int, rows: int) -> TensorDescriptor:
    """A descriptor of the scales [M, T/128] as one vector, a token tile after the other."""
    flat = scale.mT.contiguous()  # no copy where they are M-major already
    if flat.data_ptr() % TMA_ALIGNMENT:
        flat = flat.clone()
    return TensorDescriptor(flat.view(-1), [flat.numel()], [1], [block], _layout(32, 0, ctas, rows))
