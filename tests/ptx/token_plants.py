"""Faults planted in the BF16 weight gradient (`plants` says how): rows of the next group, and slots given back late.

A last step that is not whole is cut by stores to shared memory, a fence, an arrival at the barrier of both consumers
and a wait there, in this order and without a product between.
"""

from __future__ import annotations

import re

from tests.ptx.plants import ARRIVE, TRY_WAIT, Plant, change, matches, statement

SUM, FETCHED = "gluon grouped_mm_wgrad add 128x256x3", "gluon grouped_mm_wgrad add_fetched 128x256x3"
BETWEEN = r"(?:(?!wgmma|fence\.proxy)[\s\S])*?"
CUT = rf"(fence\.proxy\.async[^;]*;){BETWEEN}{statement(ARRIVE)}{BETWEEN}{TRY_WAIT}"
KEPT = r"selp\.b16(\s+%rs\d+, %rs\d+), 0, %p\d+;"  # a number of a row that is the group's, or zero
OLDER_DONE = r"(wgmma\.wait_group\.sync\.aligned\s+)1;"


def keep_rows_of_x(text: str) -> str:
    """Of the numbers that each consumer cuts, a third is dy's and stands first; those of x stay."""
    found = matches(text, KEPT)
    half = len(found) // 2
    for match in reversed([one for i, one in enumerate(found) if i % half >= half // 3]):
        text = text[: match.start()] + f"mov.b16{match[1]};" + text[match.end() :]
    return text


def no_fence_behind_a_cut(text: str) -> str:
    return change(CUT, lambda match: match[0].replace(match[1], "", 1))(text)


def no_wait_behind_a_cut(text: str) -> str:
    """The first consumer goes on when it has cut its own part."""
    wait = r"mbarrier\.try_wait[^;]*;"
    return change(CUT, lambda match: re.sub(wait, "mov.pred complete, -1;", match[0]))(text)


def give_back_at_once(text: str) -> str:
    """A consumer gives a slot back in its first step as well, when it holds no slot of the step before."""
    done = matches(text, OLDER_DONE)[0].end()
    arrival = matches(text[done:], r"@(%p\d+) " + ARRIVE)[0]
    both = matches(text, rf"and\.pred\s+{arrival[1]}, (%p\d+), (%p\d+);")[0]
    thread = next(m for m in matches(text, r"@(%p\d+) " + ARRIVE) if m[1] in (both[1], both[2]))[1]
    return text[: both.start()] + f"mov.pred {arrival[1]}, {thread};" + text[both.end() :]


TOKEN_PLANTS = (
    Plant("rows behind a group's end stay", SUM, change(KEPT, lambda match: f"mov.b16{match[1]};", None)),
    Plant("rows of x behind a group's end stay", SUM, keep_rows_of_x),
    Plant("no proxy fence behind a cut", SUM, no_fence_behind_a_cut),
    Plant("a consumer does not wait for what the other cuts", SUM, no_wait_behind_a_cut),
    Plant("the barrier of the cuts counts one consumer", FETCHED,
          change(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )2;", lambda match: f"{match[1]}1;")),
    Plant("a slot is given back under its products", FETCHED, change(OLDER_DONE, lambda match: f"{match[1]}2;", None)),
    Plant("a slot is given back that is not held", SUM, give_back_at_once),
)  # fmt: skip
