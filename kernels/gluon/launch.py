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
from dataclasses import dataclass
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
from fp8moe.kernels.triton.launch import Block, launch

TMA_ALIGNMENT = 16  # bytes: of an address, of a row, and of where a one-dimensional load begins
TMA_FLOATS = TMA_ALIGNMENT // 4
WAVE_ROWS, PIECE_COLUMNS = TILE // 2, 32
FETCHED_BYTES = 2 * WAVE_PIECES.value * WAVE_ROWS * PIECE_COLUMNS * 4  # what two consumers add to
SHARED_BYTES = 231_000  # of an SM's 227 KB, less room for barriers
WHOLE, SPLIT = 0, 1  # what each CTA of a pair has of a dim: all of it, or its half

CONSUMERS = {"free": FREE, "turns": TURNS, "pingpong": PINGPONG}

OLDEST_MULTICAST = (3, 8)  # of Triton: before it an arrival can't reach another CTA's barrier (see `pipeline`)
PAIRS_VARIABLE = "FP8MOE_PAIRS"


def pairs_allowed() -> bool:
    """Whether pairs of CTAs may be chosen: this Triton has them and FP8MOE_PAIRS is 1."""
    return _has_pairs(triton.__version__) and os.environ.get(PAIRS_VARIABLE) == "1"


@functools.cache
def _has_pairs(version: str) -> bool:
    return backend.release_of(version) >= OLDEST_MULTICAST


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
    m, k = a.data.shape
    n, grouped = b.data.shape[-2], group_offsets is not None
    assert not (grouped and tile.block_m != TILE), "a taller tile could straddle two experts"
    epilogue = ADD.value if accumulate else STORE_TMA.value if out.dtype is torch.bfloat16 else STORE.value
    scale, ctas = _m_major(a.scale), _ctas(tile)
    block_scale = _aligned(b.scale.contiguous())
    form = _form(tile, ctas, grouped, epilogue)
    c: Descriptor | Tensor = out
    if epilogue == STORE_TMA.value:
        c = Descriptor(out, [m, n], [out.stride(0), 1], form.stored)
    num_tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n * ctas)
    launch(
        rows_kernel,
        (min(max(1, sms // ctas), num_tiles),),
        _codes(a.data, form.a),
        _codes(b.data.reshape(-1, k) if grouped else b.data, form.b),
        Descriptor(scale, [(scale.shape[1] - 1) * scale.stride(1) + m], [1], form.a_scale),
        Descriptor(block_scale, [block_scale.numel()], [1], form.block_scale),
        c,
        group_offsets,
        m,
        n,
        k,
        b.data.shape[0] if grouped else 1,
        scale.stride(1),
        out.stride(0),
        **form.constants,
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
    (n, t), k, grouped = a.data.shape, b.data.shape[0], group_offsets is not None
    num_groups = out.shape[0] if grouped else 1
    ctas = _ctas(tile)
    num_tiles = num_groups * ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n * ctas)
    epilogue = _sum_epilogue(out, t // num_groups, tile, ctas) if accumulate else STORE.value
    form = _form(tile, ctas, grouped, epilogue)
    by_tma = epilogue in (ADD_TMA.value, ADD_FETCHED.value)
    launch(
        columns_kernel,
        (min(max(1, sms // ctas), num_tiles),),
        _codes(a.data, form.a),
        _codes(b.data, form.b),
        _scales(a.scale, form.a_scale),
        _scales(b.scale, form.b_scale),
        Descriptor(out, [out.numel() // k, k], [k, 1], form.added) if by_tma else out,
        group_offsets,
        num_groups,
        n,
        k,
        t,
        out.stride(-2),
        **form.constants,
    )


def _sum_epilogue(out: Tensor, tokens: int, tile: Tile, ctas: int) -> int:
    """How tiles are added into out [N, K] or [E, N, K] of `tokens` tokens a group: by TMA, fetched, or by registers.

    Fetching needs shared memory for four pieces of each consumer.
    """
    if ctas > 1 or not takes_waves(out):
        return ADD.value
    if tokens >= ADDED_BY_TMA:
        return ADD_TMA.value
    return ADD_FETCHED.value if can_fetch(tile) else ADD.value


def takes_waves(out: Tensor) -> bool:
    """Whether TMA may read and write waves of sums, out [N, K] or [E, N, K].

    It needs rows of multiples of 16 bytes, and no wave of 64 rows may reach into the next expert's.
    """
    whole = out.dim() == 2 or out.shape[1] % WAVE_ROWS == 0
    return whole and out.is_contiguous() and out.shape[-1] % TMA_FLOATS == 0 and out.data_ptr() % TMA_ALIGNMENT == 0


def can_fetch(tile: Tile) -> bool:
    """Whether shared memory has room for the ring of a weight gradient's tile and for what it is added to."""
    return not tile.multicast and has_room(tile.stages * (tile.block_m + tile.block_n) * (TILE + 4))


def has_room(ring: int) -> bool:
    """Whether what a wave of each consumer is added to fits shared memory beside a ring of so many bytes."""
    return ring + FETCHED_BYTES <= SHARED_BYTES


class Descriptor(TensorDescriptor):
    """Gluon's descriptor, made without its checks, which `_codes`, `_scales` and `_form` have made or make needless.

    `block` says for `triton.launch` what a kernel is specialized for.
    """

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: Block) -> None:
        self.base, self.shape, self.strides, self.block = base, shape, strides, block
        self.block_shape, self.layout = block.shape, block.layout
        self.padding, self.round_f32_to_tf32 = "zero", False


@dataclass(frozen=True)
class _Form:
    """What of a launch follows from its tile and epilogue alone: what each descriptor moves, and the constants."""

    a: Block
    b: Block
    a_scale: Block
    b_scale: Block
    block_scale: Block  # of a weight's blocks
    stored: Block  # STORE_TMA
    added: Block  # ADD_TMA, ADD_FETCHED
    constants: dict[str, Any]


@functools.cache
def _form(tile: Tile, ctas: int, grouped: bool, epilogue: int) -> _Form:
    return _Form(
        a=_block((_rows(tile), TILE), 8, 128, ctas, WHOLE, WHOLE),
        b=_block((_columns(tile), TILE), 8, 128, ctas, SPLIT, WHOLE),
        a_scale=_block((_rows(tile),), 32, 0, ctas, WHOLE),
        b_scale=_block((_columns(tile),), 32, 0, ctas, SPLIT),
        block_scale=_block((BLOCK_SCALES.value,), 32, 0, ctas, WHOLE),
        stored=_block((WAVE_ROWS, PIECE_COLUMNS * ctas), 16, 64, ctas, WHOLE, SPLIT),
        added=_block((WAVE_ROWS, PIECE_COLUMNS), 32, 128, ctas, WHOLE, WHOLE),
        constants={
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
        },
    )


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


def _codes(data: Tensor, block: Block) -> Descriptor:
    """A descriptor of K-major codes [M, K] for tiles of 128 along K."""
    m, k = data.shape
    stride, within = data.stride()
    if within != 1 or stride % TMA_ALIGNMENT or data.data_ptr() % TMA_ALIGNMENT:
        data, stride = data.clone(memory_format=torch.contiguous_format), k
    return Descriptor(data, [m, k], [stride, 1], block)


def _m_major(scale: Tensor) -> Tensor:
    """Scales [M, K/128] where TMA may read them: stride 1 along M, each K tile from a multiple of 16 bytes on."""
    m, tiles = scale.shape
    if scale.stride(0) == 1 and (tiles == 1 or scale.stride(1) % TMA_FLOATS == 0):
        return _aligned(scale)
    room = scale.new_empty(tiles, ceil_div(m, TMA_FLOATS) * TMA_FLOATS)[:, :m].mT
    return room.copy_(scale)


def _aligned(scale: Tensor) -> Tensor:
    return scale.clone() if scale.data_ptr() % TMA_ALIGNMENT else scale


def _scales(scale: Tensor, block: Block) -> Descriptor:
    """A descriptor of the scales [M, T/128] as one vector, a token tile after the other."""
    if scale.stride() != (1, len(scale)) or scale.data_ptr() % TMA_ALIGNMENT:
        scale = scale.mT.contiguous()  # no copy where they are M-major already
        if scale.data_ptr() % TMA_ALIGNMENT:
            scale = scale.clone()
    return Descriptor(scale, [scale.numel()], [1], block)
