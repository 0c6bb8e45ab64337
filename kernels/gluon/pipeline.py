"""The skeleton of the Hopper GEMMs: who loads, who multiplies, and how they wait for each other.

One CTA an SM, persistent: program p computes tiles p, p + P, p + 2P, ... of one fixed order, P being the number of SMs
the launch was given. Inside a CTA there are three partitions, after DeepGEMM's structure:

- the producer, one warp: fills a ring of `STAGES` slots by TMA, up to STAGES steps ahead of the slowest consumer and
  across the border between two tiles, so that an epilogue never drains the ring;
- consumers 0 and 1, four warps each: each owns half of a tile's rows (rows INDEX * BM/2 onwards), multiplies it in
  waves of 64x128 and adds every wave's product, times its scales, into FP32 registers (promotion, each 128 of K: an FP8
  tensor core keeps about 14 bits). They share the ring and nothing else; where they take turns (`consumers`) the
  promotion of one runs under the WGMMA of the other. A tile of 256x128 is two waves of rows a consumer ("tall"), one of
  128x256 two of columns ("wide", for expert groups aligned to 128 rows), one of 128x128 a single wave.

Barrier protocol. Step s (counted over all tiles of a program, the same in every partition) uses slot s % STAGES in
round s // STAGES; parity is the round's lowest bit.

    full[slot]    count 1.  The producer's expect(bytes) is its one arrival; the round ends when those bytes have
                  landed. Consumers wait for parity (s // STAGES) & 1.
    empty[slot]   count 2.  Each consumer arrives once a step, after its last read of the slot: after the wait that
                  retires its last WGMMA, and after the fence behind its last read of scales that travel in the ring.
                  The compiler puts a barrier of that consumer's four warps in front of an arrival (one thread arrives
                  for all; read in the machine code of Triton 3.6 and 3.7, and held by a test).
                  The producer waits for parity ((s // STAGES) & 1) ^ 1: true at once in round 0, where the phase
                  "before the first" counts as complete; later it is round s // STAGES - 1 that must have ended.

Scales in the ring. WGMMA reads a slot through the async proxy, and waiting for it is enough. A load of scales into
registers goes through the generic proxy, and neither the barrier of the warps nor the arrival waits for its value: such
a load, issued last and still queued behind the other consumer's stores of an epilogue, has returned the scales of the
slot's next round (on an H100, in rows of the second wave of a tile). So each consumer executes `fence_async_shared`
after the loads and before the arrival, which completes them and orders them before TMA's next write; under a WGMMA it
costs no time. A test reads in the machine code that no such load is in flight at an arrival.

Every partition derives the number of steps of a tile from the same function of the same arguments; a tile with no steps
(an empty group, rows past the last group) passes no barrier on any side. Barriers are initialised by the default
partition before the others start: `warp_specialize` itself synchronises, and the fence in front of it makes the
initialisation visible to TMA. At the end nothing is drained: the producer's last fills are all consumed, because both
sides run the same steps.

A pair (CTAS = 2, `multicast` in a tile): a cluster of two CTAs computes two tiles side by side. Their rows are the
same, so one TMA load brings them into both, in pieces of 64 rows because the language can't slice what two CTAs share;
each CTA loads its own columns. `full` and `empty` stay each CTA's own. A third barrier, `both`, lies in CTA 0, gets the
arrivals of all four consumers and holds back CTA 0's producer, which loads for the peer too. The peer's bytes may land
before its own producer expects them (a barrier may count below zero within a round) but never a round early. At the
end the CTAs wait for each other, so that no arrival meets a CTA that is gone.
    This needs Triton 3.8. In 3.7 `multicast=True` compiles, but `init` of a barrier that two CTAs share counts one
CTA's arrivals and `arrive` stays in the own CTA's memory (PTX: count 2, `mbarrier.arrive.shared::cta`), so that CTA 0
would refill slots that its peer still reads; nothing else in the language reaches a peer's barrier, and a cluster-wide
barrier can't be used inside `warp_specialize`. In 3.8 it is count 4 and `mbarrier.arrive.shared::cluster` at CTA 0's
address. Who wants them says so (`launch.pairs_allowed`): they are right on tests/ptx and on an H100, and no faster.

What becomes of the sums of a tile: `epilogues`.

Registers: two waves of FP32 sums (128 a thread), one product (64) and scales (36 where both operands have them) fit 240
without a spill only if the other wave's sum passes through each WGMMA wait and the dead product is handed on as the
ignored accumulator of the next WGMMA; written otherwise, ptxas keeps a second copy of either.

Refused: one m64n256 WGMMA a wide tile (its product alone takes 128 registers); scales multiplied into the operands (FP8
cannot hold them); a barrier that both consumers meet at, which puts both promotions in the tensor core's way at once.
Without any order they drift into that by themselves: `consumers` has two ways out, turns and ping-pong, with their
protocols. In ping-pong the ring above is two, each of one producer and one consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from fp8moe.kernels.gluon.consumers import FREE, PINGPONG

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.constexpr_function
def wave_layout(ctas=1):
    """Registers of a 64x128 FP32 product of one consumer: 4 warps of 16 rows, as WGMMA m64n128 writes it.

    A pair of CTAs has one such product each, side by side: 64x256 to the language.
    """
    shape, pair = [16, 128, 32], [[0, 1]] if ctas == 2 else []
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=shape, cga_layout=pair)


@gluon.jit
def tile_order(tile, num_m, num_n, GROUP: gl.constexpr):
    """(row, column) of a tile: GROUP rows of tiles are swept column by column, so that their operands stay in L2."""
    first = tile // (GROUP * num_n) * GROUP
    height = gl.minimum(num_m - first, GROUP)
    within = tile % (GROUP * num_n)
    return first + within % height, within // height


@gluon.jit
def find_group(row, offsets, num_groups):
    """The group that holds `row`: the last e with offsets[e] <= row, which skips empty groups; at most num_groups - 1.

    A binary search over a table that stays in L1: cheaper than a map from tile to group, which takes a launch to make.
    """
    low = 0
    high = num_groups
    while high - low > 1:
        middle = (low + high) // 2
        below = gl.load(offsets + middle) <= row
        low = gl.where(below, middle, low)
        high = gl.where(below, high, middle)
    return low


@gluon.jit
def ring_position(step, STAGES: gl.constexpr, INDEX: gl.constexpr, CONSUMERS: gl.constexpr):
    """(slot, parity) of a step; in ping-pong of a step of ring INDEX, a half of the slots."""
    SLOTS: gl.constexpr = STAGES // 2 if CONSUMERS == PINGPONG else STAGES
    slot, parity = step % SLOTS, (step // SLOTS) & 1
    if CONSUMERS == PINGPONG and INDEX == 1:
        slot += SLOTS
    return slot, parity


@gluon.constexpr_function
def barrier_layout(bases=()):
    """Of barriers whose owners among the CTAs `bases` tell: [[1]] gives each of a pair its own, [[0]] both one."""
    return mbarrier.MBarrierLayout(cga_layout=[list(basis) for basis in bases]) if bases else mbarrier.MBarrierLayout()


@gluon.jit
def make_barriers(STAGES: gl.constexpr, CTAS: gl.constexpr, CONSUMERS: gl.constexpr):
    """The ring's barriers, initialised: full (one arrival, the producer's) and empty (two, one a consumer).

    `both` is what a pair of CTAs adds: arrivals of all four consumers, for the producer that loads for both; `turn0`
    and `turn1` what turns of the consumers add (`consumers`).
    """
    OWN: gl.constexpr = barrier_layout(((1,),) if CTAS == 2 else ())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, CTAS], OWN)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, CTAS], OWN)
    both = empty
    if CTAS == 2:
        both = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout(((0,),)))
    turn0, turn1 = empty, empty
    if CONSUMERS != FREE:
        # Apart, or the compiler puts a barrier of the warps between an arrival at one and a wait for the other.
        turn0 = gl.allocate_shared_memory(gl.int64, [1, CTAS], OWN)
        turn1 = gl.allocate_shared_memory(gl.int64, [1, CTAS], OWN)
        mbarrier.init(turn0.index(0), count=1)
        mbarrier.init(turn1.index(0), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1 if CONSUMERS == PINGPONG else 2)
        if CTAS == 2:
            mbarrier.init(both.index(slot), count=2)  # for each CTA of the two
    fence_async_shared()
    return full, empty, both, turn0, turn1


@gluon.jit
def wait_empty(empty, both, slot, parity, CTAS: gl.constexpr):
    """The producer's wait for a slot that its consumers have left; where it loads for both CTAs, all four."""
    mbarrier.wait(empty.index(slot), parity)
    if CTAS == 2:
        mbarrier.wait(both.index(slot), parity)


@gluon.jit
def release(empty, both, slot, CTAS: gl.constexpr):
    """A consumer leaves a slot."""
    mbarrier.arrive(empty.index(slot), count=1)
    if CTAS == 2:
        mbarrier.arrive(both.index(slot), count=1)


@gluon.jit
def cta_rank():
    """Which of the pair this CTA is, as a number that the language believes to be the same in both."""
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r,r", [gl.program_id(0)], gl.int32, True, 1)


@gluon.jit
def load(desc, at, bar, destination, MULTICAST: gl.constexpr):
    """One TMA load that `bar` counts; MULTICAST: one of the pair loads for both."""
    if MULTICAST:
        tma.async_copy_global_to_shared(desc, at, bar, destination, multicast=True)
    else:
        tma.async_copy_global_to_shared(desc, at, bar, destination)


@gluon.jit
def rows_of(a_ring, slot, FIRST: gl.constexpr, BM: gl.constexpr, CTAS: gl.constexpr):
    """A slot's 64 rows (or scales) from FIRST on: a part of the tile or, in a pair, one of the pieces it came in."""
    if CTAS == 1:  # noqa: SIM108  one of two types, chosen while compiling
        rows = a_ring.index(slot).slice(FIRST, 64, 0)
    else:
        rows = a_ring.index(slot * (BM // 64) + FIRST // 64)
    return rows


@gluon.jit
def columns_of(b_ring, slot, WIDE: gl.constexpr, CTAS: gl.constexpr):
    """A slot's columns (or their scales) for the first wave and for the second: 128 each, of each CTA."""
    if CTAS == 1:
        b = b_ring.index(slot)
        first, second = b.slice(0, 128, 0), b.slice(128 if WIDE else 0, 128, 0)
    elif WIDE:
        first, second = b_ring.index(slot * 2), b_ring.index(slot * 2 + 1)
    else:
        first, second = b_ring.index(slot), b_ring.index(slot)
    return first, second


@gluon.jit
def start_wave(a, b, dead):
    """Begin the WGMMA of a [64, 128] and b [128, 128] (both K-major); `dead` lends its registers, not its values."""
    return warpgroup_mma(a, b.permute((1, 0)), dead, use_acc=False, is_async=True)


@gluon.jit
def finish_pair(CTAS: gl.constexpr):
    """After all partitions: a CTA stays until its peer has made its last arrival."""
    if CTAS == 2:
        gl.barrier(cluster=True)
