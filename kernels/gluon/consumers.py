"""How the two consumers of a program share its work: free, in turns, or ping-pong; `consumers` of a `tiles.Tile`.

FREE: each has half of every tile's rows and never waits for the other. On an H100 both then multiply together and
promote together, while the tensor cores idle. The orders below change no bit; `tests/ptx` proves their protocols, and
which tiles are in which order is measured (benchmarks/LOG.md, tiles.json).

TURNS, faster by 3 to 10 % from 12 steps a tile on. The same halves, and an order in which products start, after
FlashAttention-3's warp-group barriers: consumer 0's wave, consumer 1's wave, consumer 0's next wave. A consumer waits
for its turn before it starts the WGMMA of a wave and passes the turn on when all its warps have started it, not when it
is done: while the product of one runs, the other's last one ends and is promoted. The language has no named barriers;
two mbarriers do it:

    turn[i]       count 1.  Consumer 1 - i arrives once a wave, when the wave's WGMMA has been committed. Turn t of
                  consumer i is its wave number t, counted over all tiles. Consumer 1 waits for round t of turn[1],
                  consumer 0 for round t - 1 of turn[0], which before the first wave counts as complete: the first
                  turn is consumer 0's. Neither barrier can be a round ahead of its wait: the other's next turn
                  needs this one's.

Both run the same steps, so both pass the same number of turns; a tile without steps passes none. Who waits for a turn
waits for a start and not for an end, and the other's start needs no slot beyond those that this one has seen full: the
ring can't lock up with the turns. Consumer 1's last arrival is waited for by nobody. In a pair of CTAs each CTA has its
own two barriers, for its own two consumers.

PINGPONG. Each consumer has tiles of 128x128 of its own, all their rows, in two waves of 64 rows a step: consumer i
takes every second tile of the program's order, from the one of number i on. The epilogue of one then runs under the
steps of the other, for tiles of few steps (K up to 2048); the price is that 128x128 tiles read 4/3 of the bytes of
256x128. Measured, it is no faster than turns and hides no sum: no table has it. The consumers share no slot: each has
half of the ring, a producer warp of its own, and barriers to itself, `empty` with count 1. Two producers and two idle
warps are the warp group that one and three were.

    turn[1]       count 1, one round. Two tiles of the same steps that start together end together, epilogue beside
                  epilogue. So consumer 1's producer waits for this before its first load. Consumer 0's arrives when
                  it has got the slot that its consumer left halfway through their first tile, or, where it never
                  comes so far, after its last load: it waits for its own consumer alone and always gets there.

Refused: turns of ping-pong consumers, whose steps don't come in pairs; pairs of CTAs, untried.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

FREE, TURNS, PINGPONG = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def wait_turn(mine, wave, INDEX: gl.constexpr, CONSUMERS: gl.constexpr):
    """Consumer INDEX before it starts its wave number `wave`, or any of the same parity."""
    if CONSUMERS == TURNS:
        mbarrier.wait(mine.index(0), (wave & 1) ^ (1 - INDEX))


@gluon.jit
def pass_turn(other, CONSUMERS: gl.constexpr):
    """When a consumer has started a wave: the other one may start its own."""
    if CONSUMERS == TURNS:
        mbarrier.arrive(other.index(0), count=1)


@gluon.jit
def first_tile(INDEX: gl.constexpr, CONSUMERS: gl.constexpr):
    """Of consumer INDEX and who loads for it, in the program's order."""
    tile = gl.program_id(0)
    if CONSUMERS == PINGPONG:
        tile += INDEX * gl.num_programs(0)
    return tile


@gluon.jit
def tile_stride(CONSUMERS: gl.constexpr):
    """From a consumer's tile to its next."""
    stride = gl.num_programs(0)
    if CONSUMERS == PINGPONG:
        stride *= 2
    return stride


@gluon.jit
def wait_start(turn1, INDEX: gl.constexpr, CONSUMERS: gl.constexpr):
    """Producer INDEX before its first load: in ping-pong the second one waits for the first tile's half."""
    if CONSUMERS == PINGPONG and INDEX == 1:
        mbarrier.wait(turn1.index(0), 0)


@gluon.jit
def tell_start(turn1, due, INDEX: gl.constexpr, CONSUMERS: gl.constexpr):
    """The first producer of a ping-pong tells the second to start, if that is `due`."""
    if CONSUMERS == PINGPONG and INDEX == 0:
        mbarrier.arrive(turn1.index(0), count=1, pred=due)
