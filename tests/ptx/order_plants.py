"""Faults planted in the order of the two consumers (`plants` says how): turns that are lost, early or the wrong one's,
rings and tiles of a ping-pong that are taken for the other's.

The code of consumer 1 stands first and that of consumer 0 last; between them stand the producers', the second one's
before the first's. A turn is passed by the arrival between the commit of a product and its wait, and waited for by the
last wait in front of a product. A ping-pong of 6 stages has 3 slots a ring: 8 bytes a barrier, 16 KB an operand.
"""

from __future__ import annotations

from tests.ptx.plants import ARRIVE, TRY_WAIT, Plant, change, drop, flip_parity, matches, release_early, statement

TURNS, TWO_WAVES = "gluon gemm bf16 128x128x6 turns", "gluon gemm bf16 256x128x4 turns"
SUM_IN_TURNS = "gluon gemm_columns add 256x128x4 turns"
PINGPONG, SUM_IN_PINGPONG = "gluon gemm bf16 128x128x6 pingpong", "gluon grouped_wgrad add 128x128x6 pingpong"
SLOTS = 3
PASSED = (
    r"wgmma\.commit_group[^;]*;(?:(?!wgmma)[\s\S])*?(bar\.sync\s+\d+, 128;(?:(?!wgmma)[\s\S])*?"
    + statement(ARRIVE + r"_, \[(%r\d+)\]")
    + ")"
)  # a product's commit, and the barrier and arrival that pass the turn


def keep_the_turn(text: str) -> str:
    """The first wave of consumer 1 does not pass its turn on."""
    return change(PASSED, lambda match: match[0].removesuffix(match[1]))(text)


def pass_to_itself(text: str) -> str:
    """Consumer 1 arrives at the barrier that it waits for."""
    own = matches(text, TRY_WAIT)[1][1]
    return change(PASSED, lambda match: match[0].replace(f"[{match[2]}]", own))(text)


def pass_early(text: str) -> str:
    """Consumer 0 passes its turn before it starts its product."""
    passed = matches(text, PASSED)[-1]
    fence = [match for match in matches(text, r"wgmma\.fence") if match.start() < passed.start()][-1]
    rest = text[fence.start() : passed.start(1)]
    return text[: fence.start()] + passed[1] + "\n" + rest + text[passed.end() :]


def release_the_others(text: str) -> str:
    """Consumer 1 of a ping-pong gives back a slot of consumer 0's ring."""
    return change(ARRIVE + r"_, \[(%r\d+)\]", lambda match: match[0].replace("]", f"+{-SLOTS * 8}]"))(text)


def fill_the_others(text: str) -> str:
    """The second producer's rows go to the first one's ring."""
    load = r"mbarrier::complete_tx::bytes \[(%r\d+)\]"
    return change(load, lambda match: match[0].replace("]", f"+{-SLOTS * 128 * 128}]"))(text)


def never_start(text: str) -> str:
    """The first producer tells the second neither in its loop nor behind it."""
    return drop(ARRIVE, 1)(drop(ARRIVE, 2)(text))


def same_tiles(text: str) -> str:
    """Consumer 1 starts at the first tile of consumer 0."""
    number = r"mov\.u32\s+(%r\d+), %ctaid\.x;[^;]*mov\.u32\s+(%r\d+), %nctaid\.x;[^;]*add\.s32\s+%r\d+, \1, \2;"
    return change(number, lambda match: match[0].removesuffix(f"{match[2]};") + "0;")(text)


ORDER_PLANTS = (
    Plant("a consumer keeps its turn", TURNS, keep_the_turn),
    Plant("a consumer of a sum keeps its turn", SUM_IN_TURNS, keep_the_turn),
    Plant("a consumer passes its turn to itself", TURNS, pass_to_itself),
    Plant("a turn is passed before the product is started", TURNS, pass_early),
    Plant("the first turn is nobody's", TURNS, flip_parity(-1)),
    Plant("consumer 1 does not wait for its first turn", TURNS, flip_parity(1)),
    Plant("consumer 0 takes its second wave's turn for its first's", TWO_WAVES, flip_parity(-1)),
    Plant("a ping-pong consumer gives back the other ring's slot", PINGPONG, release_the_others),
    Plant("a ping-pong producer fills the other ring", PINGPONG, fill_the_others),
    Plant("a ping-pong's second producer is never told to start", PINGPONG, never_start),
    Plant("a ping-pong's second producer waits for the wrong phase", PINGPONG, flip_parity(2)),
    Plant("an empty barrier of a ping-pong counts both consumers", PINGPONG,
          change(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )1;", lambda match: f"{match[1]}2;", 3)),
    Plant("a ping-pong's slot is given back before its products", PINGPONG, release_early),
    Plant("both consumers of a ping-pong take the same tiles", PINGPONG, same_tiles),
    Plant("a ping-pong consumer of sums gives back the other ring's slot", SUM_IN_PINGPONG, release_the_others),
)  # fmt: skip
