"""A step of captured micro-batches on paper: without the host's waits, otherwise the same."""

from __future__ import annotations

import pytest

from tests.plan.test_step_time import small


def test_captured_micro_batches_do_not_wait_for_the_host():
    layout = ("parallel.ep=8", "seq_len=2048", "parallel.capacity_factor=1.5", "optimizer.sharding=none")
    plain, captured = small(*layout), small(*layout, "parallel.cuda_graphs=true")
    host = "waits for the host"
    (before, after) = ({p.name: p.seconds for p in one.parts} for one in (plain, captured))
    assert after.pop(host) == 0 and before[host] > 0
    assert captured.seconds == pytest.approx(plain.seconds - before.pop(host))
