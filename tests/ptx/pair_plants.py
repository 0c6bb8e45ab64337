"""Faults planted in pairs of CTAs (`plants` says how): who waits for whom, which CTA a load or an arrival reaches."""

from __future__ import annotations

from tests.ptx.plants import TRY_WAIT, Plant, change, drop, matches, scaled

PAIR, WIDE_PAIR = "gluon gemm bf16 256x128x4 multicast", "gluon grouped_gemm bf16 128x256x4 multicast"
SUM_OF_PAIR = "gluon grouped_wgrad add 256x128x4 multicast"
REMOTE = r"mbarrier\.arrive\.shared::cluster\.b64 "
MULTICAST = r"(@%p\d+) (cp\.async\.bulk\.tensor\.2d\S*multicast::cluster [^;]*, )(%rs\d+);"
MEET, PART = (
    rf"barrier\.cluster\.arrive{how}\.aligned;\s+barrier\.cluster\.wait\.aligned;" for how in (r"\.relaxed", "")
)


def never_wait_for_both(text: str) -> str:
    """CTA 0's producer does not wait for its peer's consumers: the producer's second wait, behind a branch."""
    wait = matches(text, rf"bra\.uni\s+skipWait;\s+\.reg \.pred complete;\s+(?:\.loc[^\n]*\s+)?{TRY_WAIT}")[0]
    start = text.index("mbarrier.try_wait", wait.start())
    return text[:start] + "mov.pred complete, -1;" + text[wait.end() :]


def both_load(text: str) -> str:
    """Each CTA of the pair loads the rows for both, so that they come twice."""
    guard = matches(text, MULTICAST)[0][1].removeprefix("@")
    return change(rf"and\.pred\s+{guard}, (%p\d+), (%p\d+);", lambda m: f"mov.pred {guard}, {m[2]};")(text)


def arrive_at_home(text: str) -> str:
    """A consumer's arrival for the pair stays in its own CTA."""
    address = matches(text, REMOTE + r"_, \[(%r\d+)\]")[0][1]
    return change(rf"(and\.b32\s+{address}, %r\d+, )-?\d+;", lambda m: f"{m[1]}-1;")(text)


def same_columns(text: str) -> str:
    """Both CTAs load the columns of the first: the producer takes its rank for 0."""
    producer = matches(text, MULTICAST)[0].start()
    rank = [m for m in matches(text, r"mov\.u32\s+(%r\d+), %cluster_ctarank;") if m.start() < producer][-1]
    column = matches(text[rank.end() : producer], rf"and\.b32\s+(%r\d+), {rank[1]}, 1;")[0][1]
    pattern = rf"(shl\.b32\s+%r\d+, ){column}, (7|8);"
    return text[: rank.end()] + change(pattern, lambda m: f"{m[1]}0, {m[2]};")(text[rank.end() :])


def only_for(cta: int, text: str) -> str:
    """What is loaded for both arrives in one CTA."""
    mask = matches(text, MULTICAST)[0][3]
    return change(rf"mov\.b16\s+{mask}, 3;", f"mov.b16 {mask}, {1 << cta};")(text)


PAIR_PLANTS = (
    Plant("a producer does not wait for its peer's consumers", PAIR, never_wait_for_both),
    Plant("a sum's producer does not wait for its peer's consumers", SUM_OF_PAIR, never_wait_for_both),
    Plant("a consumer of a pair tells only its own CTA", PAIR, drop(REMOTE)),
    Plant("a consumer's arrival for the pair stays at home", WIDE_PAIR, arrive_at_home),
    Plant("rows for both CTAs reach only CTA 0", PAIR, lambda text: only_for(0, text)),
    Plant("rows for both CTAs reach only CTA 1", SUM_OF_PAIR, lambda text: only_for(1, text)),
    Plant("both CTAs load the rows of both", PAIR, both_load),
    Plant("both CTAs of a pair load the same columns", PAIR, same_columns),
    Plant("half of a pair's bytes are expected", WIDE_PAIR, change(r"expect_tx\S* _, \[%r\d+\], (\d+);", scaled(0.5))),
    Plant("the pair's barrier counts one CTA's consumers", PAIR,
          change(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )4;", lambda m: f"{m[1]}2;", None)),
    Plant("a load for both starts before the peer's barriers exist", PAIR, change(MEET, "", None)),
    Plant("a CTA leaves before its peer's last arrival", PAIR, change(PART, "", None)),
)  # fmt: skip
