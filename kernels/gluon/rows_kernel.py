"""FP8 rows (1x128 tiles along K) times a block-scaled weight (128x128), dense or grouped by expert: Fprop and Dgrad.

    c[r, n] = sum over K tiles t of  (a[r, t] . b[e, n, t]) * a_scale[t, r] * b_scale[e, n // 128, t]

a [M, K], b [E * N, K] (E = 1 where dense) by TMA, K-major, zero beyond their edges. a_scale: FP32, M-major (stride 1
along M, `a_ld` from one K tile to the next); b_scale: FP32, contiguous [E, ceil(N/128), ceil(K/128)]. Both scales come
by plain loads one step ahead of their use, issued under the WGMMA of the step before: a row's scale in the layout of
the product is two registers a wave, and a ring would cost shared memory that the fourth stage needs.

Grouped: `offsets` int32 [E+1], multiples of 128; a tile of 128 rows lies in one expert, so tiles are 128 high. Rows
past the last offset have no steps and are written as zeros. The protocol between the partitions: `pipeline`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from fp8moe.kernels.gluon.consumers import (
    PINGPONG,
    first_tile,
    pass_turn,
    tell_start,
    tile_stride,
    wait_start,
    wait_turn,
)
from fp8moe.kernels.gluon.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    STORE_TMA,
    columns_of,
    cta_rank,
    find_group,
    finish_pair,
    finish_stores,
    load,
    make_barriers,
    release,
    ring_position,
    rows_of,
    start_wave,
    tile_order,
    wait_empty,
    wave_layout,
    write_wave,
)


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
def produce(INDEX: gl.constexpr, a_desc, b_desc, a_ring, b_ring, full, empty, both, turn1, offsets, M, N, K, num_groups,
            BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
            CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """The producer, in ping-pong consumer INDEX's: every step's two operand tiles."""
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
            mbarrier.expect(bar, (BM + BN) * 128)
            if CTAS == 1:
                load(a_desc, [row, k * 128], bar, a_ring.index(slot), False)
                load(b_desc, [group * N + col, k * 128], bar, b_ring.index(slot), False)
            else:
                for piece in gl.static_range(BM // 64):
                    load(a_desc, [row + piece * 64, k * 128], bar, a_ring.index(slot * (BM // 64) + piece), True)
                for piece in gl.static_range(PIECES):
                    at = [group * N + col + piece * 256, k * 128]
                    load(b_desc, at, bar, b_ring.index(slot * PIECES + piece), False)
            tell_start(turn1, step == halfway, INDEX, CONSUMERS)
            step += 1
    tell_start(turn1, step <= halfway, INDEX, CONSUMERS)


@gluon.jit
def scale_pointers(row, col, group, a_scale, b_scale, M, N, K, TALL: gl.constexpr, BN: gl.constexpr,
                   CTAS: gl.constexpr):  # fmt: skip
    """(a's rows, which of them exist in the first wave and in the second, b's blocks of either), for K tile 0."""
    layout: gl.constexpr = wave_layout(CTAS)
    DOWN: gl.constexpr = 64 if TALL else 0
    RIGHT: gl.constexpr = CTAS if BN > 128 else 0
    blocks_n = gl.cdiv(N, 128)
    num_k = gl.cdiv(K, 128)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    # The last wide tile of a weight may reach past its last block: any block will do, nothing of it is stored.
    block = col // 128
    if CTAS == 2:  # each CTA's own columns, a block apart
        block = gl.minimum(block + cta_rank(), blocks_n - 1)
    first = b_scale + (group * blocks_n + block) * num_k
    second = b_scale + (group * blocks_n + gl.minimum(block + RIGHT, blocks_n - 1)) * num_k
    return a_scale + rows, rows < M, rows + DOWN < M, first, second


@gluon.jit
def load_scales(a_scales, inside0, inside1, b_scales0, b_scales1, k, a_ld, TALL: gl.constexpr, BN: gl.constexpr):
    """a's and b's scales of K tile k, of the first wave and of the second."""
    sa0, sb0 = gl.load(a_scales + k * a_ld, mask=inside0, other=0.0), gl.load(b_scales0 + k)
    sa1, sb1 = sa0, sb0
    if TALL:
        sa1 = gl.load(a_scales + k * a_ld + 64, mask=inside1, other=0.0)
    elif BN > 128:
        sb1 = gl.load(b_scales1 + k)
    return sa0, sb0, sa1, sb1


@gluon.jit
def first_scales(tile, FIRST: gl.constexpr, a_scale, b_scale, offsets, M, N, K, num_groups, a_ld, TALL: gl.constexpr,
                 BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                 CTAS: gl.constexpr):  # fmt: skip
    """The scales of a tile's K tile 0, for the consumer whose rows begin at FIRST."""
    row, col, group, _ = locate(tile, M, N, K, offsets, num_groups, BM, BN * CTAS, GROUP, GROUPED)
    a_scales, inside0, inside1, b_scales0, b_scales1 = scale_pointers(row + FIRST, col, group, a_scale, b_scale, M, N,
                                                                      K, TALL, BN, CTAS)  # fmt: skip
    return load_scales(a_scales, inside0, inside1, b_scales0, b_scales1, 0, a_ld, TALL, BN)


@gluon.jit
def consume(INDEX: gl.constexpr, c, c_buffers, a_scale, b_scale, a_ring, b_ring, full, empty, both, mine, other,
            offsets, M, N, K, num_groups, a_ld, c_ld, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            GROUP: gl.constexpr, GROUPED: gl.constexpr, EPILOGUE: gl.constexpr, CTAS: gl.constexpr,
            CONSUMERS: gl.constexpr):  # fmt: skip
    """Consumer INDEX: rows INDEX * BM/2 onwards of every tile, in one wave of 64x128 or two (tall or wide).

    In ping-pong all rows, two waves, of every second tile.
    """
    layout: gl.constexpr = wave_layout(CTAS)
    WIDTH: gl.constexpr = BN * CTAS
    ALL: gl.constexpr = CONSUMERS == PINGPONG
    TALL: gl.constexpr = BM > 128 or ALL
    TWO: gl.constexpr = TALL or BN > 128
    WAVES: gl.constexpr = 2 if TWO else 1
    FIRST: gl.constexpr = 0 if ALL else INDEX * (BM // 2)
    # Where the second wave lies in the tile; without one, on the first (its sum is then never formed).
    DOWN: gl.constexpr = 64 if TALL else 0
    ACROSS: gl.constexpr = 128 * CTAS if TWO and not TALL else 0
    num_k = gl.cdiv(K, 128)
    num_tiles = gl.cdiv(M, BM) * gl.cdiv(N, WIDTH)
    buffer = c_buffers.index(INDEX)
    dead = gl.zeros((64, 128 * CTAS), gl.float32, layout)
    step = 0
    first = first_tile(INDEX, CONSUMERS)
    existing = first
    if ALL:  # the second consumer may have no tile
        existing = gl.minimum(first, num_tiles - 1)
    sa0, sb0, sa1, sb1 = first_scales(existing, FIRST, a_scale, b_scale, offsets, M, N, K, num_groups, a_ld, TALL, BM,
                                      BN, GROUP, GROUPED, CTAS)  # fmt: skip
    for tile in range(first, num_tiles, tile_stride(CONSUMERS)):
        row, col, group, steps = locate(tile, M, N, K, offsets, num_groups, BM, WIDTH, GROUP, GROUPED)
        row += FIRST
        a_scales, inside0, inside1, b_scales0, b_scales1 = scale_pointers(row, col, group, a_scale, b_scale, M, N, K,
                                                                          TALL, BN, CTAS)  # fmt: skip
        acc0 = gl.zeros((64, 128 * CTAS), gl.float32, layout)
        acc1 = gl.zeros((64, 128 * CTAS), gl.float32, layout)
        for k in range(steps):
            slot, parity = ring_position(step, STAGES, INDEX, CONSUMERS)
            scale0, scale1 = sa0 * sb0, sa1 * sb1
            # In front of the wait, where the compiler can't sink them under the first WGMMA: a whole step ahead.
            later = gl.minimum(k + 1, num_k - 1)
            sa0, sb0, sa1, sb1 = load_scales(a_scales, inside0, inside1, b_scales0, b_scales1, later, a_ld, TALL, BN)
            mbarrier.wait(full.index(slot), parity)
            b0, b1 = columns_of(b_ring, slot, TWO and not TALL, CTAS)
            wait_turn(mine, step * WAVES, INDEX, CONSUMERS)
            product = start_wave(rows_of(a_ring, slot, FIRST, BM, CTAS), b0, dead)
            pass_turn(other, CONSUMERS)
            if TWO:
                product, acc1 = warpgroup_mma_wait(0, deps=[product, acc1])
                acc0 += product * scale0[:, None]
                wait_turn(mine, 1, INDEX, CONSUMERS)
                product = start_wave(rows_of(a_ring, slot, FIRST + DOWN, BM, CTAS), b1, product)
                pass_turn(other, CONSUMERS)
                dead, acc0 = warpgroup_mma_wait(0, deps=[product, acc0])
                release(empty, both, slot, CTAS)
                acc1 += dead * scale1[:, None]
            else:
                dead = warpgroup_mma_wait(0, deps=[product])
                release(empty, both, slot, CTAS)
                acc0 += dead * scale0[:, None]
            step += 1
        # Its steps are found again at the top: Triton 3.6 and 3.7 don't carry them round the loop (benchmarks/LOG.md).
        # The next tile's first scales arrive under this tile's epilogue (after the last tile: that tile's again).
        following = gl.minimum(tile + tile_stride(CONSUMERS), num_tiles - 1)
        sa0, sb0, sa1, sb1 = first_scales(following, FIRST, a_scale, b_scale, offsets, M, N, K, num_groups, a_ld, TALL,
                                          BM, BN, GROUP, GROUPED, CTAS)  # fmt: skip
        write_wave(c, buffer, acc0, row, col, M, N, c_ld, EPILOGUE, CTAS)
        if TWO:
            write_wave(c, buffer, acc1, row + DOWN, col + ACROSS, M, N, c_ld, EPILOGUE, CTAS)
    finish_stores(EPILOGUE)


@gluon.jit(do_not_specialize=["M", "num_groups", "a_ld"])
def rows_kernel(a_desc, b_desc, c, a_scale, b_scale, offsets, M, N, K, num_groups, a_ld, c_ld, BM: gl.constexpr,
                BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                EPILOGUE: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """c = rows x blocks^T; grid: one program an SM in use, or a pair of them."""
    HEIGHT: gl.constexpr = BM if CTAS == 1 else 64
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * BM // HEIGHT, HEIGHT, 128], a_desc.layout)
    PIECES: gl.constexpr = BN // 128 if CTAS == 2 else 1
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PIECES, BN * CTAS // PIECES, 128], b_desc.layout)
    if EPILOGUE == STORE_TMA:
        c_buffers = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128 * CTAS], c.layout)
    else:
        c_buffers = a_ring  # never touched: this epilogue writes from the registers
    full, empty, both, turn0, turn1 = make_barriers(STAGES, CTAS, CONSUMERS)
    if CONSUMERS == PINGPONG:
        gl.warp_specialize(
            [
                (consume, (0, c, c_buffers, a_scale, b_scale, a_ring, b_ring, full, empty, both, turn0, turn1, offsets,
                           M, N, K, num_groups, a_ld, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (consume, (1, c, c_buffers, a_scale, b_scale, a_ring, b_ring, full, empty, both, turn1, turn0, offsets,
                           M, N, K, num_groups, a_ld, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (produce, (0, a_desc, b_desc, a_ring, b_ring, full, empty, both, turn1, offsets, M, N, K, num_groups,
                           BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
                (produce, (1, a_desc, b_desc, a_ring, b_ring, full, empty, both, turn1, offsets, M, N, K, num_groups,
                           BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, c, c_buffers, a_scale, b_scale, a_ring, b_ring, full, empty, both, turn0, turn1, offsets,
                           M, N, K, num_groups, a_ld, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (consume, (1, c, c_buffers, a_scale, b_scale, a_ring, b_ring, full, empty, both, turn1, turn0, offsets,
                           M, N, K, num_groups, a_ld, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS, CONSUMERS)),
                (produce, (0, a_desc, b_desc, a_ring, b_ring, full, empty, both, turn1, offsets, M, N, K, num_groups,
                           BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    finish_pair(CTAS)
