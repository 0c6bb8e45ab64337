"""Faults planted in the order of the two consumers (`plants` says how): turns that are lost, early or the wrong one's.

The code of consumer 1 stands before the producer's, consumer 0's behind it. A turn is passed by the arrival between the
commit of a product and its wait, and waited for by the last wait in front of a product.
"""

from __future__ import annotations

from tests.ptx.plants import ARRIVE, TRY_WAIT, Plant, change, flip_parity, matches, statement

TURNS, TWO_WAVES = "gluon gemm bf16 128x128x6 turns", "gluon gemm bf16 256x128x4 turns"
SUM_IN_TURNS = "gluon gemm_columns add 256x128x4 turns"
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


ORDER_PLANTS = (
    Plant("a consumer keeps its turn", TURNS, keep_the_turn),
    Plant("a consumer of a sum keeps its turn", SUM_IN_TURNS, keep_the_turn),
    Plant("a consumer passes its turn to itself", TURNS, pass_to_itself),
    Plant("a turn is passed before the product is started", TURNS, pass_early),
    Plant("the first turn is nobody's", TURNS, flip_parity(-1)),
    Plant("consumer 1 does not wait for its first turn", TURNS, flip_parity(1)),
    Plant("consumer 0 takes its second wave's turn for its first's", TWO_WAVES, flip_parity(-1)),
)
