"""What becomes of a tile's sums when its steps are done: written or added, from the registers or by TMA.

    STORE_TMA    BF16 through shared memory and TMA stores, which clip at the edges of the output, in pieces of 64x32:
                 three buffers a consumer, so that a piece waits for the one three before it and no tile for the last.
    STORE, ADD   any dtype from the registers, masked, written or added to what is there: no other CTA touches the tile.
    ADD_TMA      FP32 through shared memory by a TMA that adds in L2. It runs under the next tile, but L2 adds about
                 1.3 TB/s, so it pays only where a tile's contraction is long.
    ADD_FETCHED  FP32 added to a copy that TMA brought into shared memory under the tile's steps, four pieces of 64x32
                 a consumer, and stored from there by TMA: for short contractions, whose time is that of the sums'
                 traffic. By registers that traffic is all at the end of a tile, and 32 bytes of a line at a time.
                 A consumer fetches for itself: the first wave's pieces in the middle of the steps, which spreads the
                 traffic, the second wave's as the first's have been stored, each when the last TMA store has read
                 its buffer (`store_wait`). Each buffer has a barrier of count 1, whose round is the number of the wave
                 among those of the consumer.

One addition an element in all of them, so the same bits in every run.

Banks. A lane of a fragment has 8 bytes in a row, so that half a warp accesses 32 bytes in each of four rows at once. In
TMA's 128-byte swizzle those of rows 2 i and 2 i + 1 lie in the same banks, which doubles the time of an access. So of
pieces that are fetched odd rows take their right 16 columns while even ones take their left (`turn`, `turned`). Where
tiles are long the time doesn't count, and a consumer in turns would keep a word in local memory.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fp8moe.kernels.gluon.pipeline import barrier_layout, cta_rank, wave_layout

STORE_TMA, STORE, ADD, ADD_TMA = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)
ADD_FETCHED = gl.constexpr(4)
STORE_BUFFERS = gl.constexpr(3)  # of 64x32 BF16, of each consumer
WAVE_PIECES = gl.constexpr(4)  # of 64x32 in a wave


@gluon.jit
def write_wave(c, acc, row, col, num_rows, num_cols, ld, EPILOGUE: gl.constexpr, CTAS: gl.constexpr):
    """One 64x128 wave from the registers to the output at (row, col); c: a pointer, rows ld apart."""
    layout: gl.constexpr = wave_layout(CTAS)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    cols = col + gl.arange(0, 128 * CTAS, gl.SliceLayout(0, layout))
    # A sum of FP32 gradients of all experts has more than 2^31 elements: 64-bit addresses.
    pointers = c + rows.to(gl.int64)[:, None] * ld + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    if EPILOGUE == ADD:
        acc += gl.load(pointers, mask=inside, other=0.0)
    gl.store(pointers, acc.to(c.dtype.element_ty), mask=inside)


@gluon.jit
def halves(x, CTAS: gl.constexpr):
    """The left and the right half of the columns of x [64, n]; in a pair, of each CTA's columns."""
    width: gl.constexpr = x.shape[1] // (2 * CTAS)
    left, right = x.reshape([64, CTAS, 2, width]).permute((0, 1, 3, 2)).split()
    return left.reshape([64, CTAS * width]), right.reshape([64, CTAS * width])


@gluon.jit
def quarters(x, CTAS: gl.constexpr):
    """x [64, n] in four pieces, from left to right; in a pair, of each CTA's columns."""
    left, right = halves(x, CTAS)
    first, second = halves(left, CTAS)
    third, fourth = halves(right, CTAS)
    return first, second, third, fourth


@gluon.jit
def store_piece(c, buffers, piece, row, col, INDEX: gl.constexpr, NUMBER: gl.constexpr):
    """Store piece NUMBER of consumer INDEX's tile at (row, col) when the last one in its buffer has been read."""
    if NUMBER == 0:
        tma.store_wait(0)
    elif NUMBER >= STORE_BUFFERS:
        tma.store_wait(STORE_BUFFERS - 1)
    buffer = buffers.index(INDEX * STORE_BUFFERS + NUMBER % STORE_BUFFERS)
    buffer.store(piece.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(c, [row, col], buffer)


@gluon.jit
def store_wave(c, buffers, acc, row, col, INDEX: gl.constexpr, WAVE: gl.constexpr, CTAS: gl.constexpr):
    """One 64x128 wave, of a pair one of each, to the output at (row, col) by TMA, through buffers of 64x32."""
    if CTAS == 2:  # TMA takes the second CTA's piece for one 32 columns on, and its columns are 128 on
        col += cta_rank() * 96
    piece0, piece1, piece2, piece3 = quarters(acc, CTAS)
    store_piece(c, buffers, piece0, row, col, INDEX, 4 * WAVE)
    store_piece(c, buffers, piece1, row, col + 32, INDEX, 4 * WAVE + 1)
    store_piece(c, buffers, piece2, row, col + 64, INDEX, 4 * WAVE + 2)
    store_piece(c, buffers, piece3, row, col + 96, INDEX, 4 * WAVE + 3)


@gl._core.builtin
def add_by_tma(desc, at, source, _semantic=None):
    """Start a TMA that adds shared memory into a tensor: Gluon's builder has the operation, its language hasn't."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, at, source.handle)


@gluon.constexpr_function
def turned_layout():
    """Where element (r, c) of a turned piece [64, 32] FP32 lies: TMA's swizzle, with column c ^ 16 in odd rows."""
    columns, rows = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], [[1, 4 ^ 16], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0]]
    return gl.SharedLinearLayout([*columns, *rows], alignment=1024)


@gluon.jit
def turned(buffer):
    """A buffer of a piece [64, 32] FP32 as `turn` takes it."""
    return buffer._reinterpret(gl.float32, [64, 32], turned_layout())


@gluon.jit
def turn(piece):
    """A piece [64, 32] with the halves of its odd rows exchanged, in the same layout."""
    left, right = halves(piece, 1)
    odd = (gl.arange(0, 64, gl.SliceLayout(1, left.type.layout)) & 1 != 0)[:, None]
    both = gl.join(gl.where(odd, right, left), gl.where(odd, left, right))
    return gl.convert_layout(both.permute((0, 2, 1)).reshape([64, 32]), piece.type.layout, assert_trivial=True)


@gluon.jit
def add_piece(c, buffer, piece, row, col):
    """Add `piece` to the output at (row, col) when the buffer's last TMA has read it."""
    tma.store_wait(0)
    buffer.store(piece)
    fence_async_shared()
    add_by_tma(c, [row, col], buffer)


@gluon.jit
def add_wave(c, buffer, acc, row, col):
    """Add one 64x128 wave to the output at (row, col), through a buffer of 64x32."""
    piece0, piece1, piece2, piece3 = quarters(acc, 1)
    add_piece(c, buffer, piece0, row, col)
    add_piece(c, buffer, piece1, row, col + 32)
    add_piece(c, buffer, piece2, row, col + 64)
    add_piece(c, buffer, piece3, row, col + 96)


@gluon.jit
def make_sum_barriers():
    """For ADD_FETCHED, one for each piece of each consumer; made before the ring's, whose fence is for both."""
    bars = gl.allocate_shared_memory(gl.int64, [2 * WAVE_PIECES, 1], barrier_layout())
    for piece in gl.static_range(2 * WAVE_PIECES):
        mbarrier.init(bars.index(piece), count=1)
    return bars


@gluon.jit
def fetch_wave(c, buffers, bars, row, col, INDEX: gl.constexpr):
    """Start to load what the 64x128 wave at (row, col) is added to."""
    for piece in gl.static_range(WAVE_PIECES):
        tma.store_wait(WAVE_PIECES - 1 - piece)
        bar = bars.index(INDEX * WAVE_PIECES + piece)
        mbarrier.expect(bar, 64 * 32 * 4)
        tma.async_copy_global_to_shared(c, [row, col + piece * 32], bar, buffers.index(INDEX * WAVE_PIECES + piece))


@gluon.jit
def add_to_piece(c, buffers, bars, piece, row, col, wave, INDEX: gl.constexpr, NUMBER: gl.constexpr):
    """Add `piece` to what was fetched for it and start to store that at (row, col)."""
    mbarrier.wait(bars.index(INDEX * WAVE_PIECES + NUMBER), wave & 1)
    buffer = buffers.index(INDEX * WAVE_PIECES + NUMBER)
    sums = turned(buffer)
    sums.store(turn(piece) + sums.load(piece.type.layout))
    fence_async_shared()
    tma.async_copy_shared_to_global(c, [row, col], buffer)


@gluon.jit
def add_to_fetched(c, buffers, bars, acc, row, col, wave, INDEX: gl.constexpr):
    """Add a consumer's wave number `wave` [64, 128] to what was fetched for it, at (row, col)."""
    piece0, piece1, piece2, piece3 = quarters(acc, 1)
    add_to_piece(c, buffers, bars, piece0, row, col, wave, INDEX, 0)
    add_to_piece(c, buffers, bars, piece1, row, col + 32, wave, INDEX, 1)
    add_to_piece(c, buffers, bars, piece2, row, col + 64, wave, INDEX, 2)
    add_to_piece(c, buffers, bars, piece3, row, col + 96, wave, INDEX, 3)


@gluon.jit
def finish_stores(EPILOGUE: gl.constexpr):
    """Shared memory must outlive the TMA stores that read it."""
    if EPILOGUE == STORE_TMA or EPILOGUE == ADD_TMA or EPILOGUE == ADD_FETCHED:  # noqa: SIM109  compared one by one
        tma.store_wait(0)
