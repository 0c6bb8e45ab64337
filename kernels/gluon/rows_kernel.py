"""FP8 rows (1x128 tiles along K) times a block-scaled weight (128x128), dense or grouped by expert: Fprop and Dgrad.

    c[r, n] = sum over K tiles t of  (a[r, t] . b[e, n, t]) * a_scale[t, r] * b_scale[e, n // 128, t]

a [M, K], b [E * N, K] (E = 1 where dense) by TMA, K-major, zero beyond their edges. a_scale: FP32, M-major (stride 1
along M, `a_ld` from one K tile to the next, a multiple of 4); b_scale: FP32, contiguous [E, ceil(N/128), ceil(K/128)].
Both scales travel in the ring, by one-dimensional TMA from each taken as one vector: a's rows, and of b's 32 from the
multiple of 4 before the block's on, because TMA begins at 16 bytes and writes from 128 bytes on. Loaded from global
memory into registers a step ahead, they decided the speed: the compiler moved what it had loaded to where the next step
wants it, and so waited for it in the step of the load (benchmarks/LOG.md).

Grouped: `offsets` int32 [E+1], multiples of 128; a tile of 128 rows lies in one expert, so tiles are 128 high. Rows
past the last offset have no steps and are written as zeros. The protocol between the partitions: `pipeline`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from fp8moe.kernels.gluon.consumers import (
    PINGPONG,
    first_tile,
    pass_turn,
    tell_start,
    tile_stride,
    wait_start,
    wait_turn,
)
from fp8moe.kernels.gluon.epilogues import STORE_BUFFERS, STORE_TMA, finish_stores, store_wave, write_wave
from fp8moe.kernels.gluon.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    columns_of,
    cta_rank,
    find_group,
    finish_pair,
    load,
    make_barriers,
    release,
    ring_position,
    rows_of,
    start_wave,
    tile_order,
    wait_empty,
    wave_layout,
)

BLOCK_SCALES = gl.constexpr(32)  # of b, in a slot of the ring for each 128 columns: 128 bytes; one of them is used


@gluon.constexpr_function
def scalar_layout(ctas):
    """Of single values in shared memory, each CTA's own."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0], **({"cga_layout": [[0]]} if ctas == 2 else {}))


@gluon.jit
def locate(tile, M, N, K, offsets, num_groups, BM: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
           GROUPED: gl.constexpr):  # fmt: skip
    """(first row, first column, expert, steps) of a tile; the one place that all partitions take them from."""
    m, n = tile_order(tile, gl.cdiv(M, BM), gl.cdiv(N, WIDTH), GROUP)
    steps = gl.cdiv(K, 128)
    group = 0
    if GROUPED:
        group = find_group(m * BM, offsets, num_groups)
        steps = gl.where(m * BM < gl.load(offsets + num_groups), steps, 0)
    return m * BM, n * WIDTH, group, steps


@gluon.jit
def scale_at(col, group, PIECE: gl.constexpr, N, K, CTAS: gl.constexpr):
    """Where b's scale of K tile 0 lies for columns PIECE of a tile at `col`; the next K tile's is the next.

    The last wide tile of a weight may reach past its last block: any block will do, nothing of it is stored.
    """
    block = col // 128 + PIECE * CTAS
    if CTAS == 2:  # each CTA's own columns, a block apart
        block += cta_rank()
    blocks_n = gl.cdiv(N, 128)
    return (group * blocks_n + gl.minimum(block, blocks_n - 1)) * gl.cdiv(K, 128)


@gluon.jit
def produce(INDEX: gl.constexpr, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
            turn1, offsets, M, N, K, num_groups, a_ld, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            GROUP: gl.constexpr, GROUPED: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """The producer, in ping-pong consumer INDEX's: every step's two operand tiles and their scales."""
    WIDTH: gl.constexpr = BN * CTAS
    PIECES: gl.constexpr = BN // 128
    halfway = gl.cdiv(K, 128) // 2 + STAGES // 2  # by this step the consumer has left half of its first tile
    wait_start(turn1, INDEX, CONSUMERS)
    step = 0
    for tile in range(first_tile(INDEX, CONSUMERS), gl.cdiv(M, BM) * gl.cdiv(N, WIDTH), tile_stride(CONSUMERS)):
        row, col, group, steps = locate(tile, M, N, K, offsets, num_groups, BM, WIDTH, GROUP, GROUPED)
        for k in range(steps):
            slot, parity = ring_position(step, STAGES, INDEX, CONSUMERS)
            wait_empty(empty, both, slot, parity ^ 1, CTAS)
            bar = full.index(slot)
            mbarrier.expect(bar, (BM + BN) * 128 + (BM + PIECES * BLOCK_SCALES) * 4)
            if CTAS == 1:
                load(sa_desc, [k * a_ld + row], bar, sa_ring.index(slot), False)
                load(a_desc, [row, k * 128], bar, a_ring.index(slot), False)
                load(b_desc, [group * N + col, k * 128], bar, b_ring.index(slot), False)
            else:
                for piece in gl.static_range(BM // 64):
                    at = row + piece * 64
                    load(sa_desc, [k * a_ld + at], bar, sa_ring.index(slot * (BM // 64) + piece), True)
                    load(a_desc, [at, k * 128], bar, a_ring.index(slot * (BM // 64) + piece), True)
                for piece in gl.static_range(PIECES):
                    at = group * N + col + piece * 256
                    load(b_desc, [at, k * 128], bar, b_ring.index(slot * PIECES + piece), False)
            for piece in gl.static_range(PIECES):
                at = scale_at(col, group, piece, N, K, CTAS) + k
                load(sb_desc, [at & -4], bar, sb_ring.index(slot * PIECES + piece), False)
            tell_start(turn1, step == halfway, INDEX, CONSUMERS)
            step += 1
    tell_start(turn1, step <= halfway, INDEX, CONSUMERS)


@gluon.jit
def block_scale(sb_ring, slot, at, PIECE: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CTAS: gl.constexpr):
    """[1]: b's scale number `at`, of columns PIECE in a slot of the ring, for all rows of a wave."""
    PIECES: gl.constexpr = BN // 128
    single: gl.constexpr = scalar_layout(CTAS)
    scales = sb_ring._reinterpret(gl.float32, [STAGES * PIECES * BLOCK_SCALES, 1], single)
    return scales.index((slot * PIECES + PIECE) * BLOCK_SCALES + (at & 3)).load(gl.SliceLayout(1, wave_layout(CTAS)))


@gluon.jit
def consume(INDEX: gl.constexpr, c, c_buffers, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, mine, other,
            offsets, M, N, K, num_groups, c_ld, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            GROUP: gl.constexpr, GROUPED: gl.constexpr, EPILOGUE: gl.constexpr, CTAS: gl.constexpr,
            CONSUMERS: gl.constexpr):  # fmt: skip
    """Consumer INDEX: rows INDEX * BM/2 onwards of every tile, in one wave of 64x128 or two (tall or wide).

    In ping-pong all rows, two waves, of every second tile. A step's second product is added while the scales of the
    next step are on their way: read after the addition, they would keep this consumer from its next product.
    """
    layout: gl.constexpr = wave_layout(CTAS)
    down: gl.constexpr = gl.SliceLayout(1, layout)
    WIDTH: gl.constexpr = BN * CTAS
    PIECES: gl.constexpr = BN // 128
    ALL: gl.constexpr = CONSUMERS == PINGPONG
    TALL: gl.constexpr = BM > 128 or ALL
    TWO: gl.constexpr = TALL or BN > 128
    WAVES: gl.constexpr = 2 if TWO else 1
    FIRST: gl.constexpr = 0 if ALL else INDEX * (BM // 2)
    # Where the second wave lies in the tile; without one, on the first (its sum is then never formed).
    DOWN: gl.constexpr = 64 if TALL else 0
    ACROSS: gl.constexpr = 128 * CTAS if TWO and not TALL else 0
    num_tiles = gl.cdiv(M, BM) * gl.cdiv(N, WIDTH)
    zeros = gl.zeros((64, 128 * CTAS), gl.float32, layout)
    dead = zeros
    step = 0
    for tile in range(first_tile(INDEX, CONSUMERS), num_tiles, tile_stride(CONSUMERS)):
        row, col, group, steps = locate(tile, M, N, K, offsets, num_groups, BM, WIDTH, GROUP, GROUPED)
        row += FIRST
        acc0, acc1 = zeros, zeros
        last = gl.zeros((64,), gl.float32, down)  # what the product `dead` is still to be added with
        if TWO:
            dead = zeros
        at0, at1 = scale_at(col, group, 0, N, K, CTAS), scale_at(col, group, PIECES - 1, N, K, CTAS)
        for k in range(steps):
            slot, parity = ring_position(step, STAGES, INDEX, CONSUMERS)
            mbarrier.wait(full.index(slot), parity)
            b0, b1 = columns_of(b_ring, slot, TWO and not TALL, CTAS)
            scale0 = rows_of(sa_ring, slot, FIRST, BM, CTAS).load(down)
            scale1 = scale0
            if TALL:
                scale1 = rows_of(sa_ring, slot, FIRST + DOWN, BM, CTAS).load(down)
            scale0 *= block_scale(sb_ring, slot, at0 + k, 0, BN, STAGES, CTAS)
            scale1 *= block_scale(sb_ring, slot, at1 + k, PIECES - 1, BN, STAGES, CTAS)
            if TWO:
                acc1 += dead * last[:, None]
            wait_turn(mine, step * WAVES, INDEX, CONSUMERS)
            product = start_wave(rows_of(a_ring, slot, FIRST, BM, CTAS), b0, dead)
            pass_turn(other, CONSUMERS)
            fence_async_shared()  # the reads above come before the TMA that refills the slot
            if TWO:
                product, acc1 = warpgroup_mma_wait(0, deps=[product, acc1])
                acc0 += product * scale0[:, None]
                wait_turn(mine, 1, INDEX, CONSUMERS)
                product = start_wave(rows_of(a_ring, slot, FIRST + DOWN, BM, CTAS), b1, product)
                pass_turn(other, CONSUMERS)
                dead, acc0 = warpgroup_mma_wait(0, deps=[product, acc0])
                release(empty, both, slot, CTAS)
                last = scale1
            else:
                dead = warpgroup_mma_wait(0, deps=[product])
                release(empty, both, slot, CTAS)
                acc0 += dead * scale0[:, None]
            step += 1
        if TWO:
            acc1 += dead * last[:, None]
        if EPILOGUE == STORE_TMA:
            store_wave(c, c_buffers, acc0, row, col, INDEX, 0, CTAS)
            if TWO:
                store_wave(c, c_buffers, acc1, row + DOWN, col + ACROSS, INDEX, 1, CTAS)
        else:
            write_wave(c, acc0, row, col, M, N, c_ld, EPILOGUE, CTAS)
            if TWO:
                write_wave(c, acc1, row + DOWN, col + ACROSS, M, N, c_ld, EPILOGUE, CTAS)
    finish_stores(EPILOGUE)


@gluon.jit(do_not_specialize=["M", "num_groups", "a_ld"])
def rows_kernel(a_desc, b_desc, sa_desc, sb_desc, c, offsets, M, N, K, num_groups, a_ld, c_ld, BM: gl.constexpr,
                BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                EPILOGUE: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """c = rows x blocks^T; grid: one program an SM in use, or a pair of them."""
    HEIGHT: gl.constexpr = BM if CTAS == 1 else 64
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * BM // HEIGHT, HEIGHT, 128], a_desc.layout)
    PIECES: gl.constexpr = BN // 128 if CTAS == 2 else 1
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PIECES, BN * CTAS // PIECES, 128], b_desc.layout)
    sa_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BM // HEIGHT, HEIGHT], sa_desc.layout)
    sb_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BN // 128, BLOCK_SCALES], sb_desc.layout)
    if EPILOGUE == STORE_TMA:
        c_buffers = gl.allocate_shared_memory(gl.bfloat16, [2 * STORE_BUFFERS, 64, 32 * CTAS], c.layout)
    else:
        c_buffers = a_ring  # never touched: this epilogue writes from the registers
    full, empty, both, turn0, turn1 = make_barriers(STAGES, CTAS, CONSUMERS)
    if CONSUMERS == PINGPONG:
        gl.warp_specialize(
            [
                (consume, (0, c, c_buffers, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn0, turn1, offsets,
                           M, N, K, num_groups, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (consume, (1, c, c_buffers, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn1, turn0, offsets,
                           M, N, K, num_groups, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (produce, (0, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, M, N, K, num_groups, a_ld, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
                (produce, (1, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, M, N, K, num_groups, a_ld, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, c, c_buffers, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn0, turn1, offsets,
                           M, N, K, num_groups, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (consume, (1, c, c_buffers, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn1, turn0, offsets,
                           M, N, K, num_groups, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (produce, (0, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, M, N, K, num_groups, a_ld, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    finish_pair(CTAS)
