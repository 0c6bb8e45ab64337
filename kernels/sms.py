"""How many of a GPU's SMs a persistent GEMM may take: all of them, or what communication beside it leaves.

A GEMM that runs one program an SM would otherwise hold every SM until it ends, and a collective that starts meanwhile
wait for it. DeepSeek-V3 leaves 20 of 132 (report, section 3.2.2). The limit belongs to the process, like the back end.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_limit: int | None = None


def limit_sms(count: int | None) -> None:
    """At most `count` SMs for the GEMMs launched from now on; None: all."""
    global _limit
    if count is not None and count < 1:
        raise ValueError(f"a GEMM needs at least 1 SM, limit_sms got {count}: use None for all of them")
    _limit = count


@contextmanager
def limited_sms(count: int | None) -> Iterator[None]:
    """The same for the GEMMs launched within the block; None leaves the limit as it is."""
    before = _limit
    if count is not None:
        limit_sms(count)
    try:
        yield
    finally:
        limit_sms(before)


def allowed(count: int) -> int:
    """How many of a device's `count` SMs a GEMM may take now."""
    return count if _limit is None else min(_limit, count)
