"""FP8 columns times FP8 columns, both by 1x128 tiles along the contraction: Wgrad, dense or grouped by expert.

    c[e, n, k] = or += sum over token tiles t of e of  (a[n, t] . b[k, t]) * a_scale[t, n] * b_scale[t, k]

a [N, T], b [K, T] by TMA, zero beyond their edges. Here both scales change with the token tile and along both sides of
the output, so a thread needs 32 of b's a wave: held in registers a step ahead they spill. They travel in the ring
instead, by one-dimensional TMA from the M-major scales taken as one vector ([T/128 * N]; a copy that runs over the end
of a row of it brings scales of rows that are never stored). Promotion is two operations a value here, a product with
b's scale and a multiply-add with a's.

A consumer reads a step's scales as soon as the slot is full, before its first WGMMA, and fences them against TMA while
that WGMMA runs (`pipeline`, "Scales in the ring"). In a tall tile both waves use the same 32 of b's, read once: with
the sums, a product and the rows' scales they fit the 240 registers of a consumer.

Grouped: expert e contracts over tokens offsets[e] to offsets[e+1], both multiples of 128, so a tile of tokens never
touches two experts; one launch for all, the sizes read on the device. An expert without tokens has no steps and its
output is not touched. The protocol between the partitions: `pipeline`.
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
from fp8moe.kernels.gluon.epilogues import (
    ADD_FETCHED,
    ADD_TMA,
    WAVE_PIECES,
    add_to_fetched,
    add_wave,
    fetch_wave,
    finish_stores,
    make_sum_barriers,
    write_wave,
)
from fp8moe.kernels.gluon.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    columns_of,
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


@gluon.jit
def locate(tile, N, K, T, offsets, BM: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr):
    """(first row, first column, expert, first token tile, steps) of a tile, for all partitions."""
    num_m, num_n = gl.cdiv(N, BM), gl.cdiv(K, WIDTH)
    expert = 0
    first = 0
    steps = gl.cdiv(T, 128)
    if GROUPED:
        expert = tile // (num_m * num_n)
        tile = tile % (num_m * num_n)
        start = gl.load(offsets + expert)
        first = start // 128
        steps = (gl.load(offsets + expert + 1) - start) // 128
    m, n = tile_order(tile, num_m, num_n, GROUP)
    return m * BM, n * WIDTH, expert, first, steps


@gluon.jit
def produce(INDEX: gl.constexpr, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
            turn1, offsets, num_groups, N, K, T, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            GROUP: gl.constexpr, GROUPED: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """The producer, in ping-pong consumer INDEX's: every step's two operand tiles and the scales of their rows."""
    WIDTH: gl.constexpr = BN * CTAS
    PIECES: gl.constexpr = BN // 128
    _, _, _, _, steps = locate(gl.program_id(0), N, K, T, offsets, BM, WIDTH, GROUP, GROUPED)
    halfway = steps // 2 + STAGES // 2  # by this step the consumer has left half of its first tile
    wait_start(turn1, INDEX, CONSUMERS)
    num_tiles = num_groups * gl.cdiv(N, BM) * gl.cdiv(K, WIDTH)
    step = 0
    for tile in range(first_tile(INDEX, CONSUMERS), num_tiles, tile_stride(CONSUMERS)):
        row, col, _, first, steps = locate(tile, N, K, T, offsets, BM, WIDTH, GROUP, GROUPED)
        for k in range(first, first + steps):
            slot, parity = ring_position(step, STAGES, INDEX, CONSUMERS)
            wait_empty(empty, both, slot, parity ^ 1, CTAS)
            bar = full.index(slot)
            mbarrier.expect(bar, (BM + BN) * (128 + 4))
            if CTAS == 1:
                load(sa_desc, [k * N + row], bar, sa_ring.index(slot), False)
                load(a_desc, [row, k * 128], bar, a_ring.index(slot), False)
                load(sb_desc, [k * K + col], bar, sb_ring.index(slot), False)
                load(b_desc, [col, k * 128], bar, b_ring.index(slot), False)
            else:
                for piece in gl.static_range(BM // 64):
                    load(sa_desc, [k * N + row + piece * 64], bar, sa_ring.index(slot * (BM // 64) + piece), True)
                    load(a_desc, [row + piece * 64, k * 128], bar, a_ring.index(slot * (BM // 64) + piece), True)
                for piece in gl.static_range(PIECES):
                    load(sb_desc, [k * K + col + piece * 256], bar, sb_ring.index(slot * PIECES + piece), False)
                    load(b_desc, [col + piece * 256, k * 128], bar, b_ring.index(slot * PIECES + piece), False)
            tell_start(turn1, step == halfway, INDEX, CONSUMERS)
            step += 1
    tell_start(turn1, step <= halfway, INDEX, CONSUMERS)


@gluon.jit
def promote(acc, product, sa, sb):
    """acc [64, 128] + product * sa [64] (rows) * sb [128] (columns)."""
    return acc + (product * sb[None, :]) * sa[:, None]


@gluon.jit
def consume(INDEX: gl.constexpr, c, sums, bars, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, mine, other,
            offsets, num_groups, N, K, T, c_ld, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
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
    DOWN: gl.constexpr = 64 if TALL else 0
    ACROSS: gl.constexpr = 128 * CTAS if TWO and not TALL else 0
    across: gl.constexpr = gl.SliceLayout(0, layout)
    down: gl.constexpr = gl.SliceLayout(1, layout)
    dead = gl.zeros((64, 128 * CTAS), gl.float32, layout)
    step = 0
    wave = 0  # of those that were fetched
    num_tiles = num_groups * gl.cdiv(N, BM) * gl.cdiv(K, WIDTH)
    for tile in range(first_tile(INDEX, CONSUMERS), num_tiles, tile_stride(CONSUMERS)):
        row, col, expert, _, steps = locate(tile, N, K, T, offsets, BM, WIDTH, GROUP, GROUPED)
        acc0 = gl.zeros((64, 128 * CTAS), gl.float32, layout)
        acc1 = gl.zeros((64, 128 * CTAS), gl.float32, layout)
        top = expert * N + row + FIRST
        middle = step + steps // 2
        for _ in range(steps):
            if EPILOGUE == ADD_FETCHED:  # noqa: SIM102  one is known when compiling, the other is not
                if (step == middle) & (row + FIRST < N):
                    fetch_wave(c, sums, bars, top, col, INDEX)
            slot, parity = ring_position(step, STAGES, INDEX, CONSUMERS)
            mbarrier.wait(full.index(slot), parity)
            b0, b1 = columns_of(b_ring, slot, TWO and not TALL, CTAS)
            sb0, sb1 = columns_of(sb_ring, slot, TWO and not TALL, CTAS)
            cols = sb0.load(across)
            rows0 = rows_of(sa_ring, slot, FIRST, BM, CTAS).load(down)
            rows1 = rows0
            if TWO and TALL:
                rows1 = rows_of(sa_ring, slot, FIRST + DOWN, BM, CTAS).load(down)
            wait_turn(mine, step * WAVES, INDEX, CONSUMERS)
            product = start_wave(rows_of(a_ring, slot, FIRST, BM, CTAS), b0, dead)
            pass_turn(other, CONSUMERS)
            fence_async_shared()  # the reads above come before the TMA that refills the slot
            if TWO:
                product, acc1 = warpgroup_mma_wait(0, deps=[product, acc1])
                acc0 = promote(acc0, product, rows0, cols)
                if not TALL:
                    cols = sb1.load(across)
                wait_turn(mine, 1, INDEX, CONSUMERS)
                product = start_wave(rows_of(a_ring, slot, FIRST + DOWN, BM, CTAS), b1, product)
                pass_turn(other, CONSUMERS)
                if not TALL:
                    fence_async_shared()
                dead, acc0 = warpgroup_mma_wait(0, deps=[product, acc0])
                release(empty, both, slot, CTAS)
                acc1 = promote(acc1, dead, rows1, cols)
            else:
                dead = warpgroup_mma_wait(0, deps=[product])
                release(empty, both, slot, CTAS)
                acc0 = promote(acc0, dead, rows0, cols)
            step += 1
        row += FIRST
        if EPILOGUE == ADD_TMA:
            if steps > 0:
                if row < N:
                    add_wave(c, sums.index(INDEX), acc0, top, col)
                if TWO:  # noqa: SIM102
                    if row + DOWN < N:
                        add_wave(c, sums.index(INDEX), acc1, top + DOWN, col + ACROSS)
        elif EPILOGUE == ADD_FETCHED:
            if steps > 0:
                if row < N:
                    add_to_fetched(c, sums, bars, acc0, top, col, wave, INDEX)
                    wave += 1
                if TWO:  # noqa: SIM102
                    if row + DOWN < N:
                        fetch_wave(c, sums, bars, top + DOWN, col + ACROSS, INDEX)
                        add_to_fetched(c, sums, bars, acc1, top + DOWN, col + ACROSS, wave, INDEX)
                        wave += 1
        elif steps > 0:
            out = c
            if GROUPED:
                out += expert.to(gl.int64) * N * c_ld
            write_wave(out, acc0, row, col, N, K, c_ld, EPILOGUE, CTAS)
            if TWO:
                write_wave(out, acc1, row + DOWN, col + ACROSS, N, K, c_ld, EPILOGUE, CTAS)
    finish_stores(EPILOGUE)


@gluon.jit(do_not_specialize=["num_groups", "T"])
def columns_kernel(a_desc, b_desc, sa_desc, sb_desc, c, offsets, num_groups, N, K, T, c_ld, BM: gl.constexpr,
                   BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                   EPILOGUE: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """c [E, N, K] = or += columns x columns^T of each group; grid as in `rows_kernel`. EPILOGUE: all but STORE_TMA."""
    HEIGHT: gl.constexpr = BM if CTAS == 1 else 64
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * BM // HEIGHT, HEIGHT, 128], a_desc.layout)
    PIECES: gl.constexpr = BN // 128 if CTAS == 2 else 1
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PIECES, BN * CTAS // PIECES, 128], b_desc.layout)
    sa_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BM // HEIGHT, HEIGHT], sa_desc.layout)
    sb_ring = gl.allocate_shared_memory(gl.float32, [STAGES * PIECES, BN * CTAS // PIECES], sb_desc.layout)
    sums, bars = sa_ring, sa_ring  # never touched: other epilogues write from the registers
    if EPILOGUE == ADD_TMA:
        sums = gl.allocate_shared_memory(gl.float32, [2, 64, c.block_shape[1]], c.layout)
    elif EPILOGUE == ADD_FETCHED:
        sums = gl.allocate_shared_memory(gl.float32, [2 * WAVE_PIECES, 64, c.block_shape[1]], c.layout)
        bars = make_sum_barriers()
    full, empty, both, turn0, turn1 = make_barriers(STAGES, CTAS, CONSUMERS)
    if CONSUMERS == PINGPONG:
        gl.warp_specialize(
            [
                (consume, (0, c, sums, bars, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn0, turn1,
                           offsets, num_groups, N, K, T, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS,
                           CONSUMERS)),
                (consume, (1, c, sums, bars, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn1, turn0,
                           offsets, num_groups, N, K, T, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS,
                           CONSUMERS)),
                (produce, (0, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, num_groups, N, K, T, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
                (produce, (1, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, num_groups, N, K, T, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, c, sums, bars, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn0, turn1,
                           offsets, num_groups, N, K, T, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS,
                           CONSUMERS)),
                (consume, (1, c, sums, bars, a_ring, b_ring, sa_ring, sb_ring, full, empty, both, turn1, turn0,
                           offsets, num_groups, N, K, T, c_ld, BM, BN, STAGES, GROUP, GROUPED, EPILOGUE, CTAS,
                           CONSUMERS)),
                (produce, (0, a_desc, b_desc, sa_desc, sb_desc, a_ring, b_ring, sa_ring, sb_ring, full, empty, both,
                           turn1, offsets, num_groups, N, K, T, BM, BN, STAGES, GROUP, GROUPED, CTAS, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    finish_pair(CTAS)
