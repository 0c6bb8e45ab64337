"""The engine alone, on stages that multiply by a number: gradients by hand, no more alive than the checker proves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from fp8moe.layers.phase import Pass, Phase
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import build_mesh
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.schedule.build import build_schedule, forwards, num_stages
from fp8moe.schedule.simulate import peak_held
from tests.parallel.ranks import TIMEOUT, run_ranks

Gradients = dict[int, float]


class Times:
    """y = factor * x; the last stage's loss is y itself, so its gradient is 1."""

    def __init__(self, source: Callable[[], Tensor], factor: float, add: Callable[[float], None]) -> None:
        self._source, self._factor, self._add = source, factor, add
        self._gradient: Callable[[], Tensor] = lambda: torch.ones(1, dtype=torch.float64)
        self.phases = (Phase("times", "compute", self._forward, self._backward, self._wgrad),)

    def _forward(self) -> None:
        self._x = self._source()
        self.output = self._factor * self._x

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        self._gradient = gradient

    def _backward(self) -> None:
        self._dy = self._gradient()
        self.input_gradient = self._factor * self._dy

    def _wgrad(self) -> None:
        self._add(float(self._dy * self._x))


class Alive:
    """Counts the micro-batches that a rank holds: from their F until their weight gradients are done."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, change: int) -> None:
        self.now += change
        self.most = max(self.most, self.now)


def factor(stage: int) -> float:
    return 1 + stage / 16


def run(name: str, pp: int, microbatches: int, training: bool, overlap: bool) -> tuple[Gradients, list[float], int]:
    """Summed weight gradients by stage, outputs of the last stage, and the most micro-batches alive at once."""
    mesh = build_mesh(pp, 1, 1, timeout=TIMEOUT)
    schedule = build_schedule(name, pp, microbatches if training else 2 * pp)
    if not training:  # of any number of micro-batches
        schedule = forwards(schedule, microbatches)
    gradients: Gradients = {}
    outputs: list[float] = []
    alive = Alive()

    def make(stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Pass]:
        def add(gradient: float) -> None:
            gradients[stage] = gradients.get(stage, 0.0) + gradient
            alive.add(-1)

        alive.add(1)
        first = torch.full((1,), microbatch + 1.0, dtype=torch.float64)
        times = Times(source or (lambda: first), factor(stage), add)
        if stage == schedule.num_stages - 1:
            forward = times.phases[0].forward

            def last() -> None:
                forward()
                outputs.append(float(times.output))

            times.phases = (Phase("times", "compute", last, times._backward, times._wgrad),)
        return [times]

    Pipeline(
        schedule,
        mesh.pp_rank,
        Links(mesh, timedelta(seconds=30)),
        make,
        empty=lambda: torch.full((1,), float("nan"), dtype=torch.float64),
        overlap=overlap,
    ).run()
    return gradients, outputs, alive.most


def product(stages: Sequence[int]) -> float:
    result = 1.0
    for stage in stages:
        result *= factor(stage)
    return result


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "name, pp, microbatches",
    [("1f1b", 4, 6), ("1f1b", 3, 1), ("zb1p", 4, 7), ("dualpipe", 4, 8), ("dualpipe", 6, 14), ("dualpipev", 3, 7),
     ("dualpipev", 1, 2), ("1f1b", 1, 3)],
)  # fmt: skip
def test_gradients_by_hand_in_bounded_memory(name: str, pp: int, microbatches: int, overlap: bool) -> None:
    arguments = (name, pp, microbatches, True, overlap)
    answers = [run(*arguments)] if pp == 1 else run_ranks(run, pp, *arguments)
    schedule = build_schedule(name, pp, microbatches)
    found: Gradients = {}
    for gradients, _, _ in answers:
        for stage, gradient in gradients.items():
            found[stage] = found.get(stage, 0.0) + gradient
    inputs = sum(range(1, microbatches + 1))
    whole = product(range(schedule.num_stages))
    assert found == {stage: pytest.approx(inputs * whole / factor(stage)) for stage in range(schedule.num_stages)}
    outputs = sorted(output for _, outputs, _ in answers for output in outputs)
    assert outputs == pytest.approx([whole * (i + 1) for i in range(microbatches)])
    for (_, _, most), bound in zip(answers, peak_held(schedule), strict=True):
        assert most <= bound


@pytest.mark.parametrize("name, pp, microbatches", [("1f1b", 3, 5), ("dualpipe", 4, 3), ("dualpipev", 2, 5)])
def test_forwards_alone_hold_nothing(name: str, pp: int, microbatches: int) -> None:
    answers = run_ranks(run, pp, name, pp, microbatches, False, True)
    stages = num_stages(name, pp)
    outputs = sorted(output for _, outputs, _ in answers for output in outputs)
    assert outputs == pytest.approx([product(range(stages)) * (i + 1) for i in range(microbatches)])
    assert all(gradients == {} for gradients, _, _ in answers)
