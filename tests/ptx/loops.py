"""Loops of a kernel's machine code, and how often a launch went round each: one that was left at once proves nothing.

A loop ends in a branch to an earlier instruction. A loop of nothing but a barrier's `try_wait` is how PTX waits;
whether it goes round is the schedule's matter.
"""

from __future__ import annotations

from tests.ptx.counts import Counts
from tests.ptx.parser import Program

POLLING = ("mbarrier", "bra", "setp", "selp")


def loops(program: Program, counts: Counts) -> dict[str, int]:
    """Times that warps went round each loop whose end they came to, by that end's place in the source."""
    found: dict[str, int] = {}
    for number, instruction in enumerate(program.code):
        if instruction.parts[0] != "bra" or not counts.executed[number]:
            continue
        target = program.labels[instruction.operands[0]]
        body = program.code[target : number + 1]
        if target <= number and any(one.parts[0] not in POLLING for one in body):
            found[instruction.place] = found.get(instruction.place, 0) + counts.rounds.get(number, 0)
    return found
