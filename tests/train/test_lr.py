"""The schedule's shape against the report's figures, and against itself at the joints."""

from __future__ import annotations

import math

import pytest

from fp8moe.cli.compose import compose
from fp8moe.train.lr import Phase, Progress, ScheduleConfig, bias_gamma, learning_rate, mtp_weight

SHARE = ScheduleConfig(peak=2.0, phases=(Phase("constant", 0.5, 1.0), Phase("cosine", 1.0, 0.1)), warmup_steps=4)


def test_the_published_schedule() -> None:
    schedule = compose(["experiment=dsv3_pretrain", "data.paths=[some]"]).config.optimizer.schedule

    def at(tokens: float, step: int = 10**6) -> float:
        return learning_rate(schedule, Progress(step, 10**7, int(tokens)))

    assert at(0, step=0) == pytest.approx(2.2e-4 / 2000)
    assert at(0, step=1999) == pytest.approx(2.2e-4)
    assert at(0, step=999) == pytest.approx(1.1e-4)
    assert at(9.99e12) == pytest.approx(2.2e-4)
    assert at(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half way down the cosine
    assert at(14.3e12 - 1) == pytest.approx(2.2e-5, rel=1e-6)
    assert at(14.5e12) == pytest.approx(2.2e-5)
    assert at(14.7e12) == pytest.approx(7.3e-6, rel=1e-5)
    assert at(99e12) == pytest.approx(7.3e-6, rel=1e-5)
    before, after = Progress(10**6, 10**7, int(9.9e12)), Progress(10**6, 10**7, int(14.31e12))
    assert (bias_gamma(schedule, 1e-3, before), bias_gamma(schedule, 1e-3, after)) == (1e-3, 0.0)
    assert (mtp_weight(schedule, 0.3, before), mtp_weight(schedule, 0.3, after)) == (0.3, 0.1)


def test_shares_keep_the_shape_for_any_number_of_steps() -> None:
    for steps in (20, 200):
        rates = [learning_rate(SHARE, Progress(step, steps, 0)) for step in range(steps)]
        assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
        assert rates[4 : steps // 2] == pytest.approx([2.0] * (steps // 2 - 4))
        falling = rates[steps // 2 :]
        assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling)
        middle = falling[len(falling) // 2]
        assert middle == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 2)))
        assert learning_rate(SHARE, Progress(steps, steps, 0)) == pytest.approx(0.2)


def test_without_switches_nothing_switches() -> None:
    end = Progress(99, 100, 10**15)
    assert bias_gamma(SHARE, 1e-3, end) == 1e-3
    assert mtp_weight(SHARE, 0.3, end) == 0.3


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ScheduleConfig(peak=0.0, phases=SHARE.phases), "peak=0.0 must be above 0"),
        (lambda: ScheduleConfig(peak=1.0, phases=()), "phases is empty"),
        (lambda: ScheduleConfig(peak=1.0, phases=SHARE.phases[::-1]), "one ends at 1.0 and the next at 0.5"),
        (lambda: ScheduleConfig(peak=1.0, phases=SHARE.phases, warmup_steps=-1), "warmup_steps=-1"),
        (lambda: Phase("cosine", 0.0, 1.0), "until=0.0 must be above 0"),
        (lambda: Phase("cosine", 1.0, -0.1), "factor=-0.1"),
    ],
)
def test_impossible_schedules(build, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        build()
