"""The learning rate against the report's figures, and by hand where one segment ends and the next begins."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest

from fp8moe.cli.compose import compose
from fp8moe.train.lr import LearningRateConfig, Progress, Segment, bias_gamma, learning_rate, mtp_weight

SHARE = LearningRateConfig(2.0, (Segment("constant", 0.5, 1.0), Segment("cosine", 1.0, 0.1)), warmup_steps=4)


def test_the_published_learning_rate() -> None:
    config = compose(["experiment=dsv3_pretrain", "data.paths=[some]"]).config.optimizer.schedule

    def at(tokens: float, step: int = 10**6) -> float:
        return learning_rate(config, Progress(step, 10**7, int(tokens)))

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
    assert (bias_gamma(config, 1e-3, before), bias_gamma(config, 1e-3, after)) == (1e-3, 0.0)
    assert (mtp_weight(config, 0.3, before), mtp_weight(config, 0.3, after)) == (0.3, 0.1)


SEGMENTS = (Segment("constant", 100, 0.8), Segment("cosine", 200, 0.4), Segment("constant", 300, 0.1))


@pytest.mark.parametrize("unit", ["tokens", "share"])
def test_a_segment_ends_exactly_at_until(unit: Literal["tokens", "share"]) -> None:
    scale = 1 if unit == "tokens" else 400
    segments = tuple(replace(segment, until=segment.until / scale) for segment in SEGMENTS)
    config = LearningRateConfig(
        peak=10.0, phases=segments, unit=unit, bias_gamma_until=200 / scale, mtp_weight_until=300 / scale
    )

    def at(place: int) -> Progress:
        return Progress(1, 4, place) if unit == "tokens" else Progress(place, 400, 10**6)

    rates = {0: 8.0, 99: 8.0, 100: 8.0, 150: 6.0, 200: 1.0, 299: 1.0, 300: 1.0, 399: 1.0}
    for place, rate in rates.items():
        assert learning_rate(config, at(place)) == pytest.approx(rate), place
    eighth = 4.0 + 4.0 * 0.5 * (1 + math.cos(math.pi / 4))  # a quarter down the cosine from 8 to 4
    assert learning_rate(config, at(125)) == pytest.approx(eighth)
    assert 4.0 < learning_rate(config, at(199)) < 4.01
    assert [bias_gamma(config, 1e-3, at(place)) for place in (199, 200, 201)] == [1e-3, 0.0, 0.0]
    assert [mtp_weight(config, 0.3, at(place)) for place in (299, 300, 301)] == [0.3, 0.1, 0.1]


def test_a_first_cosine_starts_at_the_peak_and_a_warm_up_ends_on_it() -> None:
    config = LearningRateConfig(peak=3.0, phases=(Segment("cosine", 1.0, 0.0),), warmup_steps=3)
    assert learning_rate(config, Progress(0, 10**9, 0)) == pytest.approx(1.0)
    assert learning_rate(config, Progress(2, 10**9, 0)) == pytest.approx(3.0)
    assert learning_rate(config, Progress(3, 10**9, 0)) == pytest.approx(3.0)
    assert learning_rate(replace(config, warmup_steps=0), Progress(0, 10**9, 0)) == pytest.approx(3.0)
    assert learning_rate(replace(config, warmup_steps=1), Progress(0, 10**9, 0)) == pytest.approx(3.0)
    assert learning_rate(config, Progress(4, 4, 0)) == pytest.approx(0.0)


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


@pytest.mark.parametrize("name", ["wsd", "wsd_linear"])
def test_warm_up_stable_decay_in_closed_form(name: str) -> None:
    """Hägele et al. (arXiv 2405.18392), equation 1 and its decay functions, on 1,000 steps: 200 of them decay."""
    settings = [f"lr_schedule={name}", "optimizer.schedule.peak=0.5", "optimizer.schedule.warmup_steps=50"]
    config = compose(settings).config.optimizer.schedule
    rates = [learning_rate(config, Progress(step, 1000, 0)) for step in range(1001)]
    for step, rate in enumerate(rates):
        decayed = (step - 800) / 200
        shape = 1 - (decayed**0.5 if name == "wsd" else decayed) if step >= 800 else min(1.0, (step + 1) / 50)
        assert rate == pytest.approx(0.5 * shape, abs=1e-12), step
    assert rates[49:801] == [0.5] * 752 and rates[1000] == 0.0
    fall = [before - after for before, after in pairwise(rates[800:])]
    if name == "wsd":
        assert fall == sorted(fall, reverse=True) and fall[0] == pytest.approx(0.5 * 200**-0.5)
    else:
        assert fall == pytest.approx([0.5 / 200] * 200)


@pytest.mark.parametrize("shape", ["cosine", "linear", "sqrt"])
def test_a_segment_begins_where_the_one_before_ends(shape: Literal["cosine", "linear", "sqrt"]) -> None:
    segments = (Segment("constant", 100, 0.8), Segment(shape, 200, 0.4), Segment(shape, 300, 0.6))
    config = LearningRateConfig(peak=10.0, phases=segments, unit="tokens")

    def at(tokens: int) -> float:
        return learning_rate(config, Progress(10**6, 10**7, tokens))

    assert (at(99), at(100), at(200), at(300), at(10**9)) == pytest.approx((8.0, 8.0, 4.0, 6.0, 6.0))
    assert at(199) == pytest.approx(4.0, abs=0.05) and at(299) == pytest.approx(6.0, abs=0.05)
    halves = {"cosine": (6.0, 5.0), "linear": (6.0, 5.0), "sqrt": (8 - 4 * 0.5**0.5, 4 + 2 * 0.5**0.5)}
    assert (at(150), at(250)) == pytest.approx(halves[shape])


def test_a_schedule_of_one_word_keeps_the_peak_and_the_warm_up() -> None:
    plain = compose(["optimizer=adamw_dsv3"]).config.optimizer
    for name, shapes in {"cosine": ["cosine"], "constant": ["constant"], "wsd": ["constant", "sqrt"]}.items():
        chosen = compose(["optimizer=adamw_dsv3", f"lr_schedule={name}"]).config.optimizer
        schedule = chosen.schedule
        assert (schedule.peak, schedule.warmup_steps) == (plain.schedule.peak, plain.schedule.warmup_steps)
        assert [segment.shape for segment in schedule.phases] == shapes and schedule.unit == "share"
        # Switches in tokens would never be reached in shares.
        assert (schedule.bias_gamma_until, schedule.mtp_weight_until) == (None, None)
        assert replace(chosen, schedule=plain.schedule) == plain
    assert compose(["lr_schedule=cosine"]).config == compose([]).config, "adamw's own is the cosine"


def test_without_switches_nothing_switches() -> None:
    end = Progress(99, 100, 10**15)
    assert bias_gamma(SHARE, 1e-3, end) == 1e-3
    assert mtp_weight(SHARE, 0.3, end) == 0.3


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: LearningRateConfig(peak=0.0, phases=SHARE.phases), "peak=0.0 must be above 0"),
        (lambda: LearningRateConfig(peak=1.0, phases=()), "phases is empty"),
        (
            lambda: LearningRateConfig(peak=1.0, phases=SHARE.phases[::-1]),
            "one ends at 1.0 and the next at 0.5: sort them",
        ),
        (lambda: LearningRateConfig(peak=1.0, phases=SHARE.phases, warmup_steps=-1), "warmup_steps=-1"),
        (lambda: Segment("cosine", 0.0, 1.0), "until=0.0 must be above 0"),
        (lambda: Segment("cosine", 1.0, -0.1), "factor=-0.1"),
        (
            lambda: LearningRateConfig(1.0, (SEGMENTS[0], SEGMENTS[0]), unit="tokens"),
            "one ends at 100 and the next at 100",
        ),
    ],
)
def test_impossible_segments(build, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        build()
