"""What changes along a run: the learning rate, the router's bias step, the weight of the MTP loss.

DeepSeek-V3 (section 4.2) warms up linearly over 2K steps, stays at 2.2e-4 to 10T tokens, falls by a cosine to 2.2e-5
over 4.3T, and ends with two constants, 2.2e-5 for 333B and 7.3e-6 for 167B; the bias step is zero for the last 500B
tokens and the MTP weight falls from 0.3 to 0.1 at 10T. So a schedule is a list of phases behind a warm-up, each with
its end and its factor of the peak. Ends are counted in tokens (what the report does, and what survives a change of the
batch size) or, for short runs, as shares of the whole run, so that `steps=20` keeps the shape.

Pure functions of how far the run is: nothing here has state, and a resumed run needs none restored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Phase:
    """One piece of the schedule: its shape, where it ends (`until`, in the schedule's unit), its end over the peak.

    A constant jumps to its factor at once; a cosine falls (or rises) to it from the factor of the phase before.
    """

    shape: Literal["constant", "cosine"]
    until: float
    factor: float

    def __post_init__(self) -> None:
        if self.until <= 0:
            raise ValueError(f"optimizer.schedule.phases: until={self.until} must be above 0: it is where a phase ends")
        if self.factor < 0:
            raise ValueError(f"optimizer.schedule.phases: factor={self.factor} must be at least 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate and what goes with it, along the run.

    peak: the learning rate that all factors refer to. warmup_steps: steps from 0 up to the first phase, linear.
    unit: what `until` and the two switches count, "tokens" or "share" of the run's steps.
    bias_gamma_until: from there on the router's bias stands still; None: it never does.
    mtp_weight_until, mtp_weight_after: from there on the MTP loss has that weight; None: it keeps the model's.
    """

    peak: float
    phases: tuple[Phase, ...]
    warmup_steps: int = 0
    unit: Literal["tokens", "share"] = "share"
    bias_gamma_until: float | None = None
    mtp_weight_until: float | None = None
    mtp_weight_after: float = 0.1

    def __post_init__(self) -> None:
        if self.peak <= 0:
            raise ValueError(f"optimizer.schedule.peak={self.peak} must be above 0: DeepSeek-V3 used 2.2e-4")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if not self.phases:
            raise ValueError(
                "optimizer.schedule.phases is empty: a schedule needs at least 1 phase, a constant will do"
            )
        for one, other in pairwise(self.phases):
            if other.until <= one.until:
                raise ValueError(
                    f"optimizer.schedule.phases must end one after another, but one ends at {one.until} "
                    f"and the next at {other.until}"
                )


@dataclass(frozen=True)
class Progress:
    """How far a run is when a step starts: `step` steps of `steps` done, `tokens` tokens consumed."""

    step: int
    steps: int
    tokens: int


def _position(schedule: ScheduleConfig, at: Progress) -> float:
    return at.tokens if schedule.unit == "tokens" else at.step / max(at.steps, 1)


def learning_rate(schedule: ScheduleConfig, at: Progress) -> float:
    """The learning rate of the step that starts at `at`; past the last phase it keeps that phase's end.

    The warm-up's first step has 1/warmup_steps of the rate, not zero: a step that changes nothing is lost.
    """
    position = _position(schedule, at)
    rate = schedule.peak * _factor(schedule.phases, position)
    if at.step < schedule.warmup_steps:
        rate *= (at.step + 1) / schedule.warmup_steps
    return rate


def _factor(phases: tuple[Phase, ...], position: float) -> float:
    start, factor = 0.0, 1.0
    for phase in phases:
        if position < phase.until:
            if phase.shape == "constant":
                return phase.factor
            done = (position - start) / (phase.until - start)
            return phase.factor + (factor - phase.factor) * 0.5 * (1.0 + math.cos(math.pi * done))
        start, factor = phase.until, phase.factor
    return factor


def bias_gamma(schedule: ScheduleConfig, gamma: float, at: Progress) -> float:
    """The router bias's step of the step that starts at `at`: `gamma`, or 0 once `bias_gamma_until` is reached."""
    until = schedule.bias_gamma_until
    return 0.0 if until is not None and _position(schedule, at) >= until else gamma


def mtp_weight(schedule: ScheduleConfig, weight: float, at: Progress) -> float:
    """The MTP loss's weight: `weight`, or `mtp_weight_after` once `mtp_weight_until` is reached."""
    until = schedule.mtp_weight_until
    return schedule.mtp_weight_after if until is not None and _position(schedule, at) >= until else weight
