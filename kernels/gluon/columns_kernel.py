"""FP8 columns times FP8 columns, both by 1x128 tiles along the contraction: Wgrad, dense or grouped by expert.

    c[e, n, k] = or += sum over token tiles t of e of  (a[n, t] . b[k, t]) * a_scale[t, n] * b_scale[t, k]

a [N, T], b [K, T] by TMA, zero beyond their edges. Here both scales change with the token tile and along both sides of
the output, so a thread needs 32 of b's a wave: held in registers a step ahead they spill. They travel in the ring
instead, by one-dimensional TMA from the M-major scales taken as one vector ([T/128 * N]; a copy that runs over the end
of a row of it brings scales of rows that are never stored). Promotion is two operations a value here, a product with
b's scale and a multiply-add with a's.

Grouped: expert e contracts over tokens offsets[e] to offsets[e+1], both multiples of 128, so a tile of tokens never
touches two experts; one launch for all, the sizes read on the device. An expert without tokens has no steps and its
output is not touched. The protocol between the partitions: `pipeline`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from fp8moe.kernels.gluon.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    make_barriers,
    ring_position,
    start_wave,
    tile_order,
    wave_layout,
    write_wave,
)


@gluon.jit
def locate(tile, N, K, T, offsets, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr):
    """(first row, first column, expert, first token tile, steps) of a tile, for all partitions."""
    num_m, num_n = gl.cdiv(N, BM), gl.cdiv(K, BN)
    expert = tile // (num_m * num_n)
    m, n = tile_order(tile % (num_m * num_n), num_m, num_n, GROUP)
    first = 0
    steps = gl.cdiv(T, 128)
    if GROUPED:
        start = gl.load(offsets + expert)
        first = start // 128
        steps = (gl.load(offsets + expert + 1) - start) // 128
    return m * BM, n * BN, expert, first, steps


@gluon.jit
def produce(a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, offsets, num_groups, N, K,
            T, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
            GROUPED: gl.constexpr):  # fmt: skip
    """The producer: every step's two operand tiles and the scales of their rows."""
    BYTES: gl.constexpr = (
        a_desc.block_type.nbytes + b_desc.block_type.nbytes + sa_desc.block_type.nbytes + sb_desc.block_type.nbytes
    )
    step = 0
    for tile in range(gl.program_id(0), num_groups * gl.cdiv(N, BM) * gl.cdiv(K, BN), gl.num_programs(0)):
        row, col, _, first, steps = locate(tile, N, K, T, offsets, BM, BN, GROUP, GROUPED)
        for k in range(first, first + steps):
            slot, parity = ring_position(step, STAGES)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            tma.async_copy_global_to_shared(sa_desc, [k * N + row], full.index(slot), sa_ring.index(slot))
            tma.async_copy_global_to_shared(sb_desc, [k * K + col], full.index(slot), sb_ring.index(slot))
            tma.async_copy_global_to_shared(a_desc, [row, k * 128], full.index(slot), a_ring.index(slot))
            tma.async_copy_global_to_shared(b_desc, [col, k * 128], full.index(slot), b_ring.index(slot))
            step += 1


@gluon.jit
def promote(acc, product, sa, sb):
    """acc + product * sa (rows) * sb (columns); sa and sb: their 64 and 128 scales in shared memory."""
    layout: gl.constexpr = wave_layout()
    rows, cols = sa.load(gl.SliceLayout(1, layout)), sb.load(gl.SliceLayout(0, layout))
    return acc + (product * cols[None, :]) * rows[:, None]


@gluon.jit
def consume(INDEX: gl.constexpr, c, a_ring, b_ring, sa_ring, sb_ring, full, empty, offsets, num_groups, N, K, T, c_ld,
            BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
            EPILOGUE: gl.constexpr):  # fmt: skip
    """Consumer INDEX: rows INDEX * BM/2 onwards of every tile, in one wave of 64x128 or two (tall or wide)."""
    layout: gl.constexpr = wave_layout()
    TWO: gl.constexpr = BM * BN > 128 * 128
    TALL: gl.constexpr = BM > 128
    FIRST: gl.constexpr = INDEX * (BM // 2)
    DOWN: gl.constexpr = 64 if TALL else 0
    ACROSS: gl.constexpr = 128 if TWO and not TALL else 0
    dead = gl.zeros((64, 128), gl.float32, layout)
    step = 0
    for tile in range(gl.program_id(0), num_groups * gl.cdiv(N, BM) * gl.cdiv(K, BN), gl.num_programs(0)):
        row, col, expert, _, steps = locate(tile, N, K, T, offsets, BM, BN, GROUP, GROUPED)
        acc0 = gl.zeros((64, 128), gl.float32, layout)
        acc1 = gl.zeros((64, 128), gl.float32, layout)
        for _ in range(steps):
            slot, parity = ring_position(step, STAGES)
            mbarrier.wait(full.index(slot), parity)
            a, b, sa, sb = a_ring.index(slot), b_ring.index(slot), sa_ring.index(slot), sb_ring.index(slot)
            product = start_wave(a.slice(FIRST, 64, 0), b.slice(0, 128, 0), dead)
            if TWO:
                product, acc1 = warpgroup_mma_wait(0, deps=[product, acc1])
                acc0 = promote(acc0, product, sa.slice(FIRST, 64, 0), sb.slice(0, 128, 0))
                product = start_wave(a.slice(FIRST + DOWN, 64, 0), b.slice(ACROSS, 128, 0), product)
                dead, acc0 = warpgroup_mma_wait(0, deps=[product, acc0])
                acc1 = promote(acc1, dead, sa.slice(FIRST + DOWN, 64, 0), sb.slice(ACROSS, 128, 0))
            else:
                dead = warpgroup_mma_wait(0, deps=[product])
                acc0 = promote(acc0, dead, sa.slice(FIRST, 64, 0), sb.slice(0, 128, 0))
            # Only now: the scales of this slot were read after its last WGMMA.
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        if steps > 0:
            out = c + expert.to(gl.int64) * N * c_ld
            write_wave(out, c, acc0, row + FIRST, col, N, K, c_ld, EPILOGUE)
            if TWO:
                write_wave(out, c, acc1, row + FIRST + DOWN, col + ACROSS, N, K, c_ld, EPILOGUE)


@gluon.jit(do_not_specialize=["num_groups", "T"])
def columns_kernel(a_desc, b_desc, sa_desc, sb_desc, c, offsets, num_groups, N, K, T, c_ld, BM: gl.constexpr,
                   BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                   EPILOGUE: gl.constexpr):  # fmt: skip
    """c [E, N, K] = or += columns x columns^T of each group; grid: one program an SM in use. EPILOGUE: STORE or ADD."""
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, 128], b_desc.layout)
    sa_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BM], sa_desc.layout)
    sb_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BN], sb_desc.layout)
    full, empty = make_barriers(STAGES)
    gl.warp_specialize(
        [
            (consume, (0, c, a_ring, b_ring, sa_ring, sb_ring, full, empty, offsets, num_groups, N, K, T, c_ld, BM, BN,
                       STAGES, GROUP, GROUPED, EPILOGUE)),
            (consume, (1, c, a_ring, b_ring, sa_ring, sb_ring, full, empty, offsets, num_groups, N, K, T, c_ld, BM, BN,
                       STAGES, GROUP, GROUPED, EPILOGUE)),
            (produce, (a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, offsets,
                       num_groups, N, K, T, BM, BN, STAGES, GROUP, GROUPED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
