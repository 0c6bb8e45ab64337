"""Pipeline engine on stages that multiply by a number: gradients by hand, memory bounded, and what it does when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.layers.phase import Pass, Phase
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import build_mesh
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.profile.spans import Recorder, listening
from fp8moe.schedule.action import Kind, Schedule
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


class Logged(Times):
    """A stage of one rank that records its phases, the SMs that each may take, and when its output is read."""

    def __init__(self, stage: int, microbatch: int, source: Callable[[], Tensor] | None, log: list[str]) -> None:
        super().__init__(source or (lambda: torch.ones(1, dtype=torch.float64)), factor(stage), lambda gradient: None)
        self.log, self.name = log, f"{stage}.{microbatch}"
        self.asked_back: list[Callable[[], Tensor]] = []
        steps = {"F": self._forward, "B": self._backward, "W": self._wgrad}

        def step(letter: str) -> Callable[[], None]:
            def call() -> None:
                steps[letter]()
                log.append(f"{letter}{self.name} {backend.allowed_sms(100)}")

            return call

        self.phases = (Phase("attn", "compute", step("F"), step("B"), step("W")),)

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        self.asked_back.append(gradient)
        super().backward_from(gradient)

    @property
    def output(self) -> Tensor:
        self.log.append(f"read {self.name}")
        return self._output

    @output.setter
    def output(self, value: Tensor) -> None:
        self._output = value


class Wire:
    """Links of one rank whose peers send ones."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def send(self, tensor: Tensor, target: int, name: str) -> None:
        self.log.append(f"send {name} {float(tensor):.4f}")

    def receive(self, buffer: Tensor, source: int, name: str) -> Any:
        assert buffer.isnan().all()
        self.log.append(f"post {name}")
        arrival = mock.Mock()
        arrival.wait = lambda: (self.log.append(f"take {name}"), torch.ones(1, dtype=torch.float64))[1]
        return arrival

    def finish(self) -> None:
        self.log.append("finish")


def alone(
    schedule: Schedule, rank: int = 0, logged: type[Logged] = Logged, **options: Any
) -> tuple[list[str], dict[str, Logged]]:
    """What one rank of a schedule does, with `Wire` in place of its links."""
    log: list[str] = []
    made: dict[str, Logged] = {}

    def make(stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Pass]:
        assert (source is None) == (stage == 0)
        one = made[f"{stage}.{microbatch}"] = logged(stage, microbatch, source, log)
        return [one]

    nan = lambda: torch.full((1,), float("nan"), dtype=torch.float64)  # noqa: E731
    Pipeline(schedule, rank, Wire(log), make, nan, **options).run()  # type: ignore[arg-type]
    return log, made


def test_an_output_is_read_when_the_next_stage_needs_it_and_not_before() -> None:
    log, _ = alone(build_schedule("dualpipev", 1, 4))
    reads = [at for at, entry in enumerate(log) if entry.startswith("read")]
    assert [log[at] for at in reads] == [f"read 0.{i}" for i in range(4)]
    for at in reads:  # the next thing to run is the next stage's forward, though other actions stood between
        assert log[at + 1].startswith(log[at].replace("read 0", "F1"))
    assert log.index("read 0.1") > log.index("F0.1 100") + 1


def test_a_pair_without_overlap_runs_forward_then_backward_then_weights() -> None:
    logs = (alone(build_schedule("dualpipev", 1, 2), overlap=overlap)[0] for overlap in (False, True))
    one_by_one, together = ([entry.split()[0] for entry in log if entry[0] in "FBW"] for log in logs)
    pair = build_schedule("dualpipev", 1, 2).actions[0][4]
    assert str(pair) == "F1.1&BW0.0"
    at = one_by_one.index("F1.1")
    assert one_by_one[at : at + 3] == ["F1.1", "B0.0", "W0.0"]
    assert sorted(one_by_one) == sorted(together)


def test_messages_stand_where_the_schedule_says() -> None:
    log, made = alone(build_schedule("1f1b", 3, 2), rank=1)
    assert [entry for entry in log if not entry.startswith(("read", "F", "B", "W"))] == [
        "post RECV_F1.0<-rank 0", "post RECV_F1.1<-rank 0", "take RECV_F1.0<-rank 0", "send SEND_F1.0->rank 2 1.0625",
        "post RECV_B1.0<-rank 2", "take RECV_F1.1<-rank 0", "send SEND_F1.1->rank 2 1.0625", "post RECV_B1.1<-rank 2",
        "take RECV_B1.0<-rank 2", "send SEND_B1.0->rank 0 1.0625", "take RECV_B1.1<-rank 2",
        "send SEND_B1.1->rank 0 1.0625", "finish",
    ]  # fmt: skip
    assert all(len(one.asked_back) == 1 for one in made.values())
    _, last = alone(build_schedule("1f1b", 3, 2), rank=2)
    assert all(one.asked_back == [] for one in last.values())  # the last stage begins with the loss


def test_a_stage_of_several_passes_gives_its_last_output_and_its_first_gradient() -> None:
    """Stage 0 multiplies by 2 and 5, stage 1 by 3 and 6; weight gradients by hand."""
    found: dict[tuple[int, int, int], float] = {}

    def make(stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Pass]:
        def keep(number: int) -> Callable[[float], None]:
            return lambda gradient: found.__setitem__((stage, number, microbatch), gradient)

        x = torch.full((1,), microbatch + 1.0, dtype=torch.float64)
        first = Times(source or (lambda: x), 2.0 + stage, keep(0))
        second = Times(lambda: first.output, 5.0 + stage, keep(1))
        first.backward_from(lambda: second.input_gradient)
        return [first, second]

    schedule = build_schedule("dualpipev", 1, 2)
    Pipeline(schedule, 0, Wire([]), make, lambda: torch.zeros(1)).run()  # type: ignore[arg-type]
    by_hand = {(0, 0): 90.0, (0, 1): 36.0, (1, 0): 60.0, (1, 1): 30.0}
    assert found == {(*at, i): value * (i + 1) for at, value in by_hand.items() for i in range(2)}


def test_each_computation_has_a_span_and_messages_have_none() -> None:
    schedule, kept = build_schedule("1f1b", 3, 2), Recorder()
    with listening(kept):
        alone(schedule, rank=1)
    names = [span.name for span in kept.spans if span.name[1:5] != " att"]
    assert names == [str(action) for action in schedule.actions[1] if not action.kind.is_message]


@pytest.mark.parametrize("dropped", [{Kind.W}, {Kind.B, Kind.W}, {Kind.SEND_F}])
def test_work_that_a_schedule_leaves_behind_is_noticed(dropped: set[Kind]) -> None:
    schedule = build_schedule("zb1p", 2, 2)
    actions = tuple(a for a in schedule.actions[0] if not (a.kind in dropped and a.microbatch == 1))
    with pytest.raises(AssertionError, match="left work behind"):
        alone(replace(schedule, actions=(actions, schedule.actions[1])))
