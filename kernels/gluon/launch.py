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
from fp8moe.kernels.gluon.consumers import FREE, PINGPONG, TURNS
from fp8moe.kernels.gluon.epilogues import ADD, ADD_FETCHED, ADD_TMA, STORE, STORE_TMA, WAVE_PIECES
from fp8moe.kernels.gluon.rows_kernel import BLOCK_SCALES, rows_kernel
from fp8moe.kernels.tiles import ADDED_BY_TMA, DEFAULT_DEVICE, HOPPER_SMS, PAIR, Tile
from fp8moe.kernels.triton.launch import Block, Described, Prepared, by_shapes, is_contiguous, layout_of

TMA_ALIGNMENT = 16  # bytes: of an address, of a row, and of where a one-dimensional load begins
TMA_FLOATS = TMA_ALIGNMENT // 4
WAVE_ROWS, PIECE_COLUMNS = TILE // 2, 32
FETCHED_BYTES = 2 * WAVE_PIECES.value * WAVE_ROWS * PIECE_COLUMNS * 4  # what two consumers add to
SHARED_BYTES = 231_000  # of an SM's 227 KB, less room for barriers
WHOLE, SPLIT = 0, 1  # what each CTA of a pair has of a dim: all of it, or its half

CONSUMERS = {"free": FREE, "turns": TURNS, "pingpong": PINGPONG}

OLDEST_MULTICAST = (3, 8)  # of Triton: before it an arrival can't reach another CTA's barrier (see `pipeline`)
PAIRS_VARIABLE = "FP8MOE_PAIRS"


@functools.cache
def pairs_allowed() -> bool:
    """Whether pairs of CTAs may be chosen: this Triton has them and FP8MOE_PAIRS is 1; asked once in a process."""
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
    (m, k), n, groups = a.data.shape, b.data.shape[-2], 0 if group_offsets is None else b.data.shape[0]
    (a_codes, a_stride), (b_codes, b_stride), scale = _codes(a.data), _codes(b.data), _m_major(a.scale)
    launch_on = rows_launch(
        m, n, k, groups, a_stride, b_stride, scale.stride(1), out.stride(0), out.dtype, accumulate, tile, sms
    )
    launch_on(a_codes, b_codes, scale, _aligned(b.scale.contiguous()), out, group_offsets)


@by_shapes
def rows_launch(
    m: int, n: int, k: int, groups: int, a_stride: int, b_stride: int, scale_stride: int, out_stride: int,
    out_dtype: torch.dtype, accumulate: bool, tile: Tile, sms: int,
) -> Prepared:  # fmt: skip
    """groups: 0 without offsets."""
    assert not (groups and tile.block_m != TILE), "a taller tile could straddle two experts"
    epilogue = ADD.value if accumulate else STORE_TMA.value if out_dtype is torch.bfloat16 else STORE.value
    ctas, (n_tiles, k_tiles), matrices = _ctas(tile), (ceil_div(n, TILE), ceil_div(k, TILE)), max(groups, 1)
    described: tuple[Described, ...] = (
        ([m, k], [a_stride, 1], _block((_rows(tile), TILE), 8, 128, ctas, WHOLE, WHOLE)),
        ([matrices * n, k], [b_stride, 1], _block((_columns(tile), TILE), 8, 128, ctas, SPLIT, WHOLE)),
        ([(k_tiles - 1) * scale_stride + m], [1], _block((_rows(tile),), 32, 0, ctas, WHOLE)),
        ([matrices * n_tiles * k_tiles], [1], _block((BLOCK_SCALES.value,), 32, 0, ctas, WHOLE)),
    )
    if epilogue == STORE_TMA.value:
        stored = _block((WAVE_ROWS, PIECE_COLUMNS * ctas), 16, 64, ctas, WHOLE, SPLIT)
        described += (([m, n], [out_stride, 1], stored),)
    num_tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n * ctas)
    return Prepared(
        rows_kernel, (min(max(1, sms // ctas), num_tiles),), m, n, k, matrices, scale_stride, out_stride,
        described=described, descriptor=Descriptor, **_constants(tile, ctas, groups > 0, epilogue),
    )  # fmt: skip


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
    (n, t), k, groups = a.data.shape, b.data.shape[0], 0 if group_offsets is None else out.shape[0]
    (a_codes, a_stride), (b_codes, b_stride) = _codes(a.data), _codes(b.data)
    epilogue = STORE.value
    if accumulate:
        epilogue = sum_epilogue(*layout_of(out), t // max(groups, 1), tile)
    launch_on = columns_launch(n, k, t, groups, a_stride, b_stride, out.stride(-2), epilogue, tile, sms)
    launch_on(a_codes, b_codes, _scales(a.scale), _scales(b.scale), out, group_offsets)


@by_shapes
def columns_launch(
    n: int, k: int, t: int, groups: int, a_stride: int, b_stride: int, out_stride: int, epilogue: int, tile: Tile,
    sms: int,
) -> Prepared:  # fmt: skip
    """groups: 0 without offsets."""
    ctas, t_tiles, matrices = _ctas(tile), ceil_div(t, TILE), max(groups, 1)
    described: tuple[Described, ...] = (
        ([n, t], [a_stride, 1], _block((_rows(tile), TILE), 8, 128, ctas, WHOLE, WHOLE)),
        ([k, t], [b_stride, 1], _block((_columns(tile), TILE), 8, 128, ctas, SPLIT, WHOLE)),
        ([n * t_tiles], [1], _block((_rows(tile),), 32, 0, ctas, WHOLE)),
        ([k * t_tiles], [1], _block((_columns(tile),), 32, 0, ctas, SPLIT)),
    )
    if epilogue in (ADD_TMA.value, ADD_FETCHED.value):
        added = _block((WAVE_ROWS, PIECE_COLUMNS), 32, 128, ctas, WHOLE, WHOLE)
        described += (([matrices * n, k], [k, 1], added),)
    num_tiles = matrices * ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n * ctas)
    return Prepared(
        columns_kernel, (min(max(1, sms // ctas), num_tiles),), matrices, n, k, t, out_stride,
        described=described, descriptor=Descriptor, **_constants(tile, ctas, groups > 0, epilogue),
    )  # fmt: skip


def sum_epilogue(shape: torch.Size, strides: tuple[int, ...], rest: int, tokens: int, tile: Tile) -> int:
    """How tiles are added into [N, K] or [E, N, K] of `tokens` tokens a group: by TMA, fetched, or by registers.

    Fetching needs shared memory for four pieces of each consumer.
    """
    if tile.multicast or not takes_waves(shape, strides, rest):
        return ADD.value
    if tokens >= ADDED_BY_TMA:
        return ADD_TMA.value
    return ADD_FETCHED.value if can_fetch(tile) else ADD.value


def takes_waves(shape: torch.Size, strides: tuple[int, ...], rest: int) -> bool:
    """Whether TMA may read and write waves of sums, [N, K] or [E, N, K] of this layout.

    It needs rows of multiples of 16 bytes, and no wave of 64 rows may reach into the next expert's.
    """
    whole = len(shape) == 2 or shape[1] % WAVE_ROWS == 0
    return whole and is_contiguous(shape, strides) and shape[-1] % TMA_FLOATS == 0 and rest == 0


def can_fetch(tile: Tile) -> bool:
    """Whether shared memory has room for the ring of a weight gradient's tile and for what it is added to."""
    return not tile.multicast and has_room(tile.stages * (tile.block_m + tile.block_n) * (TILE + 4))


def has_room(ring: int) -> bool:
    """Whether what a wave of each consumer is added to fits shared memory beside a ring of so many bytes."""
    return ring + FETCHED_BYTES <= SHARED_BYTES


class Descriptor(TensorDescriptor):
    """Gluon's descriptor, made without its checks, which `_codes`, `_scales` and `_block` have made or make needless.

    `block` says for `triton.launch` what a kernel is specialized for.
    """

    block_shape = property(lambda self: self.block.shape)
    layout = property(lambda self: self.block.layout)

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: Block) -> None:
        self.base, self.shape, self.strides, self.block = base, shape, strides, block


def _constants(tile: Tile, ctas: int, grouped: bool, epilogue: int) -> dict[str, Any]:
    return {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "STAGES": tile.stages,
        "GROUP": tile.group,
        "GROUPED": grouped,
        "EPILOGUE": epilogue,
        "CTAS": ctas,
        "CONSUMERS": CONSUMERS[tile.consumers].value,
        "num_ctas": ctas,
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
def _block(shape: tuple[int, ...], bits: int, swizzle: int, ctas: int, *halves: int) -> Block:
    """What a descriptor moves at a time, in memory as TMA takes it; `halves`: for each dim WHOLE or SPLIT in a pair."""
    pair = {"cga_layout": [list(halves)]} if ctas == PAIR else {}
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(halves), **pair)
    return Block(list(shape), layout)


def _codes(data: Tensor) -> tuple[Tensor, int]:
    """K-major codes [M, K], or [E, M, K] one matrix behind the other, and how far apart their rows are."""
    layout = layout_of(data)
    if not is_k_major(*layout):
        return data.clone(memory_format=torch.contiguous_format), data.shape[-1]
    return data, layout[1][-2]


def is_k_major(shape: torch.Size, strides: tuple[int, ...], rest: int) -> bool:
    """Whether TMA may read codes of this layout as `_codes` gives them."""
    one = len(shape) == 2 or is_contiguous(shape, strides)
    return one and strides[-1] == 1 and strides[-2] % TMA_ALIGNMENT == 0 and rest == 0


def _m_major(scale: Tensor) -> Tensor:
    """Scales [M, K/128] where TMA may read them: stride 1 along M, each K tile from a multiple of 16 bytes on."""
    (m, tiles), strides, _ = layout_of(scale)
    if is_m_major(scale.shape, strides, 0):
        return _aligned(scale)
    room = scale.new_empty(tiles, ceil_div(m, TMA_FLOATS) * TMA_FLOATS)[:, :m].mT
    return room.copy_(scale)


def is_m_major(shape: torch.Size, strides: tuple[int, ...], rest: int) -> bool:
    """Whether TMA may read scales of this layout as `_m_major` gives them."""
    return strides[0] == 1 and (shape[1] == 1 or strides[1] % TMA_FLOATS == 0) and rest == 0


def _aligned(scale: Tensor) -> Tensor:
    return scale.clone() if scale.data_ptr() % TMA_ALIGNMENT else scale


def _scales(scale: Tensor) -> Tensor:
    """Scales [M, T/128] as one vector lies, a token tile after the other."""
    if scale.stride() != (1, scale.shape[0]):
        scale = scale.mT.contiguous()  # no copy where they are M-major already
    return _aligned(scale)
