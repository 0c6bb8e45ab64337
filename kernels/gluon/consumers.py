"""How the two consumers of a program share its work: free, or in turns; `consumers` of a `tiles.Tile`.

FREE, the default: each has half of every tile's rows and never waits for the other. On an H100 the tensor cores are
busy 63 % of the time of such a product and nothing else is full (benchmarks/LOG.md): both consumers multiply, then both
promote. What follows is offered against that. It changes no bit and nobody has measured it: it was proven in tests/ptx,
and a GPU decides (`python -m benchmarks.tune --consumers free turns`).

TURNS. The same halves, and an order in which products start, after FlashAttention-3's warp-group barriers: consumer 0's
wave, consumer 1's wave, consumer 0's next wave. A consumer waits for its turn before it starts the WGMMA of a wave and
passes the turn on when all its warps have started it, not when it is done: while the product of one runs, the other's
last one ends and is promoted. The language has no named barriers; two mbarriers do it:

    turn[i]       count 1.  Consumer 1 - i arrives once a wave, when the wave's WGMMA has been committed. Turn t of
                  consumer i is its wave number t, counted over all tiles. Consumer 1 waits for round t of turn[1],
                  consumer 0 for round t - 1 of turn[0], which before the first wave counts as complete: the first
                  turn is consumer 0's. Neither barrier can be a round ahead of its wait: the other's next turn
                  needs this one's.

Both run the same steps, so both pass the same number of turns; a tile without steps passes none. Who waits for a turn
waits for a start and not for an end, and the other's start needs no slot beyond those that this one has seen full: the
ring can't lock up with the turns. Consumer 1's last arrival is waited for by nobody. In a pair of CTAs each CTA has its
own two barriers, for its own two consumers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

FREE, TURNS = gl.constexpr(0), gl.constexpr(1)


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
