"""BF16 tokens times BF16 tokens: the unquantized weight gradient, dense or grouped by expert.

    c[e, n, k] = sum over tokens t of e of  dy[t, n] * x[t, k],  added to what is in c

dy [T, N], x [T, K], both as they lie: WGMMA of BF16 takes operands whose contraction is the outer dim of shared memory.
A step is a box of 64 tokens of each, in columns of 64 (one line of the 128-byte swizzle): two of dy, one for each
consumer, and BN / 64 of x that both read. A consumer has 64 rows of a tile and all its columns, one m64n256 WGMMA for
16 tokens. Sums stay in the tensor core over all steps (BF16 needs no promotion), 128 registers a thread. Partitions and
barriers are those of `pipeline`, without turns and pairs, with one difference: while a step's products run a consumer
already waits for the next slot and starts that step's, and gives the first slot back when its products have ended.

Groups start and end anywhere. TMA knows the end of the tensor, not of a group: in a last step that is not whole, rows
behind the group's end belong to the next group, and may hold NaN. They are set to zero in shared memory, of both
operands, for 0 x NaN is NaN. Each consumer does so in its box of dy and in its half of x, which the other reads too:

    ends    count 2.  Each consumer arrives once a tile whose last step is not whole, after the fence behind its
            stores, and then waits for round r, r being the number of such tiles before. Neither can be a round ahead.
            The products of the step before run meanwhile.

An empty group has no steps and its output is not touched.

Sums: `epilogues`, fetched by TMA for any number of tokens, or by registers where TMA can't. On an H100 other rings and
the adds of L2 are slower (benchmarks/LOG.md).

Refused: tensor maps of each group, which the device would have to write; operands zeroed by registers (`where` between
load and product), since WGMMA takes transposed operands from shared memory only; a mask of dy alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp8moe.kernels.gluon.consumers import FREE
from fp8moe.kernels.gluon.epilogues import (
    ADD_FETCHED,
    WAVE_PIECES,
    add_to_fetched,
    fetch_wave,
    finish_stores,
    halves,
    make_sum_barriers,
    write_wave,
)
from fp8moe.kernels.gluon.pipeline import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    barrier_layout,
    load,
    make_barriers,
    release,
    ring_position,
    tile_order,
    wait_empty,
    wave_layout,
)

BM = gl.constexpr(128)  # rows of a tile: 64 of each consumer
TOKENS = gl.constexpr(64)  # of a step
LINE = gl.constexpr(64)  # BF16 numbers of a line of shared memory


@gluon.constexpr_function
def sum_layout(columns):
    """Registers of a [64, columns] FP32 product of one consumer, as one WGMMA of BF16 writes it."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def locate(tile, N, K, T, offsets, BN: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr):
    """(first row, first column, expert, first token, tokens) of a tile, for all partitions."""
    num_m, num_n = gl.cdiv(N, BM), gl.cdiv(K, BN)
    expert = 0
    first = 0
    tokens = T
    if GROUPED:
        expert = tile // (num_m * num_n)
        tile = tile % (num_m * num_n)
        first = gl.load(offsets + expert)
        tokens = gl.load(offsets + expert + 1) - first
    m, n = tile_order(tile, num_m, num_n, GROUP)
    return m * BM, n * BN, expert, first, tokens


@gluon.jit
def produce(dy_desc, x_desc, dy_ring, x_ring, full, empty, both, offsets, num_groups, N, K, T, BN: gl.constexpr,
            STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr):  # fmt: skip
    """The producer: every step's boxes of both operands."""
    num_tiles = num_groups * gl.cdiv(N, BM) * gl.cdiv(K, BN)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, col, _, first, tokens = locate(tile, N, K, T, offsets, BN, GROUP, GROUPED)
        for k in range(gl.cdiv(tokens, TOKENS)):
            slot, parity = ring_position(step, STAGES, 0, FREE)
            wait_empty(empty, both, slot, parity ^ 1, 1)
            bar = full.index(slot)
            mbarrier.expect(bar, (BM + BN) * TOKENS * 2)
            load(dy_desc, [first + k * TOKENS, row], bar, dy_ring.index(slot * 2), False)
            load(dy_desc, [first + k * TOKENS, row + LINE], bar, dy_ring.index(slot * 2 + 1), False)
            load(x_desc, [first + k * TOKENS, col], bar, x_ring.index(slot), False)
            step += 1


@gluon.jit
def zero_rows(box, count):
    """A box of tokens keeps its first `count` rows; the others become zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, box.shape[0], gl.SliceLayout(1, layout))
    box.store(gl.where((rows < count)[:, None], box.load(layout), 0.0))


@gluon.jit
def cut_step(dy_box, x_box, count, ends, number, INDEX: gl.constexpr):
    """Consumer INDEX before a step of `count` whole rows: its box of dy and its half of x without those behind them.

    number: of this tile among those whose last step is not whole.
    """
    LINES: gl.constexpr = x_box.shape[1] // LINE // 2
    zero_rows(dy_box, count)
    for line in gl.static_range(LINES):
        zero_rows(x_box.slice((INDEX * LINES + line) * LINE, LINE, 1), count)
    fence_async_shared()
    mbarrier.arrive(ends.index(0), count=1)
    mbarrier.wait(ends.index(0), number & 1)


@gluon.jit
def waves_of(acc, TWO: gl.constexpr):
    """The waves of 64x128 of a consumer's sums, as the epilogues take them; one of 128 columns twice."""
    layout: gl.constexpr = wave_layout()
    if TWO:
        left, right = halves(acc, 1)
        first, second = gl.convert_layout(left, layout), gl.convert_layout(right, layout)
    else:
        first = gl.convert_layout(acc, layout)
        second = first
    return first, second


@gluon.jit
def consume(INDEX: gl.constexpr, c, sums, bars, dy_ring, x_ring, full, empty, both, ends, offsets, num_groups, N, K, T,
            stride_e, c_ld, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
            EPILOGUE: gl.constexpr):  # fmt: skip
    """Consumer INDEX: rows INDEX * 64 onwards of every tile, in one wave of 64x128 or two."""
    layout: gl.constexpr = sum_layout(BN)
    TWO: gl.constexpr = BN > 128
    step = 0
    cut = 0  # tiles whose last step was not whole
    wave = 0  # of those that were fetched
    num_tiles = num_groups * gl.cdiv(N, BM) * gl.cdiv(K, BN)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, col, expert, _, tokens = locate(tile, N, K, T, offsets, BN, GROUP, GROUPED)
        row += INDEX * 64
        top = expert * N + row
        acc = gl.zeros((64, BN), gl.float32, layout)
        middle = gl.cdiv(tokens, TOKENS) // 2
        for k in range(gl.cdiv(tokens, TOKENS)):
            slot, parity = ring_position(step, STAGES, 0, FREE)
            mbarrier.wait(full.index(slot), parity)
            dy_box, x_box = dy_ring.index(slot * 2 + INDEX), x_ring.index(slot)
            left = tokens - k * TOKENS
            if left < TOKENS:
                cut_step(dy_box, x_box, left, ends, cut, INDEX)
            acc = warpgroup_mma(dy_box.permute((1, 0)), x_box, acc, is_async=True)
            if EPILOGUE == ADD_FETCHED:  # noqa: SIM102  one is known when compiling, the other is not
                if (k == middle) & (row < N):
                    fetch_wave(c, sums, bars, top, col, INDEX)
            acc = warpgroup_mma_wait(1, deps=[acc])
            before, _ = ring_position(step + STAGES - 1, STAGES, 0, FREE)
            mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        if tokens > 0:
            last, _ = ring_position(step + STAGES - 1, STAGES, 0, FREE)
            release(empty, both, last, 1)
            cut += (tokens % TOKENS != 0).to(gl.int32)
            acc0, acc1 = waves_of(acc, TWO)
            if EPILOGUE == ADD_FETCHED:
                if row < N:
                    add_to_fetched(c, sums, bars, acc0, top, col, wave, INDEX)
                    wave += 1
                    if TWO:  # noqa: SIM102
                        if col + 128 < K:
                            fetch_wave(c, sums, bars, top, col + 128, INDEX)
                            add_to_fetched(c, sums, bars, acc1, top, col + 128, wave, INDEX)
                            wave += 1
            else:
                out = c + expert.to(gl.int64) * stride_e if GROUPED else c
                write_wave(out, acc0, row, col, N, K, c_ld, EPILOGUE, 1)
                if TWO:
                    write_wave(out, acc1, row, col + 128, N, K, c_ld, EPILOGUE, 1)
    finish_stores(EPILOGUE)


@gluon.jit(do_not_specialize=["num_groups", "T"])
def tokens_kernel(dy_desc, x_desc, c, offsets, num_groups, N, K, T, stride_e, c_ld, BN: gl.constexpr,
                  STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
                  EPILOGUE: gl.constexpr):  # fmt: skip
    """c [E, N, K] += dy [tokens of e, N]^T @ x [tokens of e, K]; grid as in `rows_kernel`.

    EPILOGUE: ADD, with c a pointer, or ADD_FETCHED, with c a descriptor of all experts' rows.
    """
    dy_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, TOKENS, LINE], dy_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, BN], x_desc.layout)
    sums, bars = dy_ring, dy_ring  # never touched: the registers add
    if EPILOGUE == ADD_FETCHED:
        sums = gl.allocate_shared_memory(gl.float32, [2 * WAVE_PIECES, 64, c.block_shape[1]], c.layout)
        bars = make_sum_barriers()
    ends = gl.allocate_shared_memory(gl.int64, [1, 1], barrier_layout())
    mbarrier.init(ends.index(0), count=2)
    full, empty, both, _, _ = make_barriers(STAGES, 1, FREE)
    gl.warp_specialize(
        [
            (consume, (0, c, sums, bars, dy_ring, x_ring, full, empty, both, ends, offsets, num_groups, N, K, T,
                       stride_e, c_ld, BN, STAGES, GROUP, GROUPED, EPILOGUE)),
            (consume, (1, c, sums, bars, dy_ring, x_ring, full, empty, both, ends, offsets, num_groups, N, K, T,
                       stride_e, c_ld, BN, STAGES, GROUP, GROUPED, EPILOGUE)),
            (produce, (dy_desc, x_desc, dy_ring, x_ring, full, empty, both, offsets, num_groups, N, K, T, BN, STAGES,
                       GROUP, GROUPED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
