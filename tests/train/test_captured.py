"""A captured micro-batch is the micro-batch: losses, gradients and weights of several steps, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels import cross_entropy, permute
from fp8moe.kernels.row_map import most_rows
from fp8moe.layers import dispatch
from fp8moe.train.captured import CapturedMicroBatch
from fp8moe.train.metrics import StepReport
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from tests.train.recorded_graph import RecordedGraph
from tests.train.runs import built, configured, weights_of

RAMP = ("batch.ramp_from=4", "batch.ramp_samples=8", "batch.increment=4", "parallel.schedule=1f1b")
STEPS = 5  # of 2, 2, 4, 4 and 4 micro-batches
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have room, and nothing is read because it costs a CPU nothing."""
    plan_rows = dispatch.plan_rows

    def with_room(ids_TK: Tensor, num_experts: int, *, room: int | None) -> Any:
        assert room is None
        return plan_rows(ids_TK, num_experts, room=most_rows(ids_TK.numel(), num_experts))

    monkeypatch.setattr(dispatch, "plan_rows", with_room)
    for module in (permute, cross_entropy):
        monkeypatch.setattr(module, "_read_for_free", lambda tensor: False)


def captured_run(settings: list[str]) -> tuple[Run, list[RecordedGraph]]:
    run, graphs = built(configured(settings)), list[RecordedGraph]()

    def make_graph() -> RecordedGraph:
        graphs.append(RecordedGraph())
        return graphs[-1]

    run.captured = CapturedMicroBatch(run.model, CPU, make_graph)
    return run, graphs


def steps(run: Run, number: int = STEPS) -> list[tuple[StepReport, Tensor, dict[str, Tensor]]]:
    return [(train_step(run), run.model.main_grads.dense.clone(), weights_of(run)) for _ in range(number)]


def same(one: list[Any], other: list[Any]) -> None:
    for (report, gradient, weights), (expected, of_gradient, of_weights) in zip(one, other, strict=True):
        for name in ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_violation", "tokens", "lr"):
            assert getattr(report, name) == getattr(expected, name), (report.step, name)
        assert torch.equal(gradient, of_gradient), report.step
        assert [name for name, weight in weights.items() if not torch.equal(weight, of_weights[name])] == []


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_a_captured_run_has_the_bits_of_any_other(corpus: list[str], precision: str) -> None:
    settings = [*corpus, *RAMP, f"precision={precision}"]
    run, graphs = captured_run(settings)
    same(steps(run), steps(built(configured(settings))))
    assert len(graphs) == 1
