"""What changes along a run: the learning rate, the router's bias step, the weight of the MTP loss.

DeepSeek-V3 (section 4.2) warms up linearly over 2K steps, stays at 2.2e-4 to 10T tokens, falls by a cosine to 2.2e-5
over 4.3T, and ends with two constants, 2.2e-5 for 333B and 7.3e-6 for 167B; the bias step is zero for the last 500B
tokens and the MTP weight falls from 0.3 to 0.1 at 10T. So the learning rate is a list of segments behind a warm-up,
each with its end and its factor of the peak. Ends are counted in tokens (what the report does, and what survives a
change of the batch size) or, for short runs, as shares of the whole run, so that `steps=20` keeps the shape.

WSD (warm-up, stable, decay: MiniCPM, arXiv 2404.06395) is a constant and then a fall to zero, for which Hägele et al.
(arXiv 2405.18392) measured a line and 1-sqrt over the last fifth of a run, 1-sqrt the better: the shapes `linear` and
`sqrt`. MiniCPM's own exponential fall is left out: it takes a half-life, one constant more.

Pure functions of how far the run is: nothing here has state, and a resumed run needs none restored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fp8moe.limits import Range, check_fields

MOST_TOKENS = 1e18
Shape = Literal["constant", "cosine", "linear", "sqrt"]


@dataclass(frozen=True)
class Segment:
    """One part of the learning rate's course: its shape, where it ends (`until`), the rate there over the peak.

    A constant jumps to its factor at once; the others fall (or rise) to it from the factor of the segment before: a
    cosine, a line, or 1 - sqrt(share of the segment done).
    """

    shape: Shape
    until: float
    factor: float

    def __post_init__(self) -> None:
        end = "use 1.0 for the end of the run under unit=share"
        check_fields(
            self,
            "optimizer.schedule.phases",
            until=Range(above=0, most=MOST_TOKENS, use=end),
            factor=Range(least=0, most=1000),
        )


@dataclass(frozen=True)
class LearningRateConfig:
    """The learning rate along the run, and the two settings that switch along with it; `optimizer.schedule`."""

    peak: float  # the learning rate that all factors refer to
    # segments in order, each {shape: constant, cosine, linear or sqrt, until: where it ends, factor: rate there
    # / peak}
    phases: tuple[Segment, ...]
    warmup_steps: int = 0  # steps from 0 up to the first segment, linear
    # what `until` and the two switches count: tokens, or share of the run's steps
    unit: Literal["tokens", "share"] = "share"
    bias_gamma_until: float | None = None  # from there on the router's bias no longer moves; None: it always does
    mtp_weight_until: float | None = None  # from there on the MTP loss has mtp_weight_after; None: it keeps the model's
    mtp_weight_after: float = 0.1  # weight of the MTP loss from mtp_weight_until on

    def __post_init__(self) -> None:
        place = Range(least=0, most=MOST_TOKENS)
        check_fields(
            self,
            "optimizer.schedule",
            peak=Range(above=0, most=100, use="DeepSeek-V3 used 2.2e-4"),
            warmup_steps=Range(least=0, use="use 0 for no warm-up"),
            bias_gamma_until=place,
            mtp_weight_until=place,
            mtp_weight_after=Range(least=0, most=100, use="DeepSeek-V3 used 0.1"),
        )
        self._check_unit()
        for segment, after in pairwise(self.phases):
            if after.until <= segment.until:
                raise ValueError(
                    f"optimizer.schedule.phases must end one after another, and one ends at {segment.until} and the "
                    f"next at {after.until}: sort them by until"
                )
        if not self.phases:
            raise ValueError(
                "optimizer.schedule.phases is empty and at least 1 phase is needed: use a constant, "
                "{shape: constant, until: 1.0, factor: 1.0}"
            )

    def _check_unit(self) -> None:
        """Shares of a run end at 1; ends in tokens are above 1, so that shares without their unit are noticed."""
        ends = {f"phases[{i}].until": segment.until for i, segment in enumerate(self.phases)}
        switches = {name: getattr(self, name) for name in ("bias_gamma_until", "mtp_weight_until")}
        for name, end in (ends | switches).items():
            if self.unit == "share" and end is not None and end > 1:
                raise ValueError(
                    f"optimizer.schedule.{name}={end} is a share of the run under unit=share and must be at most 1: "
                    "use 1.0 for the end of the run, or unit=tokens"
                )
            if self.unit == "tokens" and name in ends and end <= 1:
                raise ValueError(
                    f"optimizer.schedule.{name}={end} counts tokens under unit=tokens and must be above 1: use "
                    "unit=share for shares of the run"
                )


@dataclass(frozen=True)
class Progress:
    """How far a run is when a step starts: `step` steps of `steps` done, `tokens` tokens consumed."""

    step: int
    steps: int
    tokens: int


def learning_rate(config: LearningRateConfig, at: Progress) -> float:
    """The learning rate of the step that starts at `at`; past the last segment it keeps that segment's end.

    The warm-up's first step has 1/warmup_steps of the rate, not zero: a step that changes nothing is lost.
    """
    rate = config.peak * _factor(config.phases, _position(config, at))
    if at.step < config.warmup_steps:
        rate *= (at.step + 1) / config.warmup_steps
    return rate


def bias_gamma(config: LearningRateConfig, gamma: float, at: Progress) -> float:
    """The router bias's step of the step that starts at `at`: `gamma`, or 0 once `bias_gamma_until` is reached."""
    return 0.0 if _has_reached(config.bias_gamma_until, config, at) else gamma


def mtp_weight(config: LearningRateConfig, weight: float, at: Progress) -> float:
    """The MTP loss's weight: `weight`, or `mtp_weight_after` once `mtp_weight_until` is reached."""
    return config.mtp_weight_after if _has_reached(config.mtp_weight_until, config, at) else weight


def _position(config: LearningRateConfig, at: Progress) -> float:
    return at.tokens if config.unit == "tokens" else at.step / at.steps


def _has_reached(until: float | None, config: LearningRateConfig, at: Progress) -> bool:
    return until is not None and _position(config, at) >= until


def _factor(segments: tuple[Segment, ...], position: float) -> float:
    start, factor = 0.0, 1.0
    for segment in segments:
        if position < segment.until:
            done = (position - start) / (segment.until - start)
            return segment.factor + (factor - segment.factor) * _left(segment.shape, done)
        start, factor = segment.until, segment.factor
    return factor


def _left(shape: Shape, done: float) -> float:
    """The share of a segment's fall that is left when the share `done` of the segment has passed."""
    if shape == "constant":
        return 0.0
    if shape == "linear":
        return 1.0 - done
    if shape == "sqrt":
        return 1.0 - math.sqrt(done)
    return 0.5 * (1.0 + math.cos(math.pi * done))
