"""Seconds of blocks by hand: what each message hides under, and which compute has fewer SMs for it."""

import pytest

from fp8moe.plan.layer_time import BlockTime, alone_seconds, pair_seconds


def block(compute, message=None, shared=None, slower=None):
    seconds = {(part, phase): compute for part in "FBW" for phase in ("attn", "mlp")}
    if message is not None:
        seconds |= {(part, phase): message for part in "FB" for phase in ("dispatch", "combine")}
    if shared is not None:
        seconds |= {(part, "shared"): shared for part in "FBW"}
    beside = None if slower is None else {key: value * slower for key, value in seconds.items()}
    return BlockTime(seconds, dict.fromkeys("FBW", 0), {}, beside)


def test_a_pair_hides_messages_under_compute_up_to_their_length():
    quiet, short, long = block(1.0), block(1.0, 0.5), block(1.0, 10.0)
    assert pair_seconds([quiet] * 3, [quiet] * 3) == 18
    # combine(B) under attn(F), dispatch(F) under mlp(B), dispatch(B) under mlp(W), combine(F) under attn(B).
    assert pair_seconds([short], [short]) == 6
    assert alone_seconds([short], "F") == 3 and alone_seconds([short], "W") == 2
    assert pair_seconds([long], [long]) == 40, "four messages, one behind the other"
    assert pair_seconds([], [short]) == pytest.approx(0.5 + 4), "combine is exposed, dispatch is under mlp(W)"
    assert pair_seconds([short, short], [short]) == pytest.approx(6 + 3)


def test_what_a_backward_alone_hides():
    """Its dispatch under mlp's weight gradients, and the next block's combine under attention's."""
    short, wide = block(1.0, 0.5), block(1.0, 1.25)
    assert pair_seconds([], [short] * 3) == pytest.approx(0.5 + 3 * 4), "the first combine alone is exposed"
    assert pair_seconds([], [wide] * 3) == pytest.approx(1.25 + 3 * 4 + 3 * 0.25 + 2 * 0.25)
    assert pair_seconds([], [short] * 3, wgrads=False) == alone_seconds([short] * 3, "B") == 3 * (2 + 2 * 0.5)
    assert pair_seconds([], [short, block(1.0), short]) == pytest.approx(2 * 0.5 + 3 * 4 - 0.5), "a dense one between"


def test_shared_experts_hide_the_message_that_mlp_waits_for():
    thin, wide = block(1.0, 0.5, shared=0.25), block(1.0, 0.5, shared=2.0)
    assert alone_seconds([thin], "F") == alone_seconds([thin], "B") == 2 + 0.25 + 2 * 0.5 - 0.25
    assert alone_seconds([wide] * 2, "F") == 2 * (2 + 2.0 + 0.5), "combine is waited for"
    assert pair_seconds([], [wide]) == 4 + 2 * 2.0, "weight gradients of shared experts are mlp's"
    assert pair_seconds([wide], [wide]) == 6 + 3 * 2.0


def test_compute_has_fewer_sms_between_a_messages_start_and_its_wait():
    slow, wide = block(1.0, 0.5, slower=2.0), block(1.0, 0.5, shared=2.0, slower=2.0)
    assert alone_seconds([slow] * 2, "F") == 2 * (2 + 2 * 0.5), "nothing runs beside a message"
    assert alone_seconds([wide], "F") == 2 + 2 * 2.0 + 0.5
    # Slow are mlp's weight gradients and, under the next block's combine, attention's.
    assert pair_seconds([], [slow] * 2) == 0.5 + 2 * 4 + 2 * 1.0 + 1.0
    assert pair_seconds([slow] * 2, [slow] * 2) == 2 * 12, "a pair always has a message in flight"
    assert alone_seconds([slow], "W") == 2
