"""A captured micro-batch is the micro-batch: losses, gradients and weights of several steps, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels import cross_entropy, permute
from fp8moe.kernels.row_map import most_rows
from fp8moe.layers import dispatch
from fp8moe.train import build
from fp8moe.train.captured import CapturedMicroBatch
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.recorded_graph import RecordedGraph
from tests.train.runs import built, configured, stored
from tests.train.test_families import GROUPED

GRAPHS = "parallel.cuda_graphs=true"
RAMP = ("batch.ramp_from=4", "batch.ramp_samples=8", "batch.increment=4")
STEPS = 4  # of 2, 2, 4 and 4 micro-batches, whose losses have other weights then
REPORTED = ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_violation", "tokens")
made: list[RecordedGraph] = []


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded, rows have room, and nothing is read because that costs a CPU nothing."""
    plan_rows = dispatch.plan_rows

    def with_room(ids_TK: Tensor, num_experts: int, *, room: int | None) -> Any:
        assert room is None
        return plan_rows(ids_TK, num_experts, room=most_rows(ids_TK.numel(), num_experts))

    def make_graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    def make_captured(config: Any, model: Any, device: torch.device) -> CapturedMicroBatch | None:
        return CapturedMicroBatch(model, device, lambda: make_graph) if config.parallel.cuda_graphs else None

    made.clear()
    monkeypatch.setattr(dispatch, "plan_rows", with_room)
    monkeypatch.setattr(build, "make_captured", make_captured)
    for module in (permute, cross_entropy):
        monkeypatch.setattr(module, "_read_for_free", lambda tensor: False)


def steps(settings: list[str], world_size: int = 1) -> list[dict[str, Any]]:
    """What each step gives: figures, the gradients that the update saw, all that a checkpoint would hold."""
    run, found = built(configured(settings, world_size=world_size)), []
    for _ in range(STEPS):
        report = train_step(run)
        figures = {name: getattr(report, name) for name in REPORTED}
        grads = {"dense": run.model.main_grads.dense.clone(), "expert": run.model.main_grads.expert.clone()}
        found.append({**figures, **grads, **stored(run)})
    return found


def differing(settings: list[str], world_size: int = 1) -> tuple[list[tuple[int, str]], int]:
    """(step, name) of what capture changes; and the graphs that it took."""
    plain, captured = steps(settings, world_size), steps([*settings, GRAPHS], world_size)
    return [
        (step, name)
        for step, (one, other) in enumerate(zip(plain, captured, strict=True), 1)
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name])
    ], len(made)


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_a_captured_run_has_the_bits_of_any_other(corpus: list[str], precision: str) -> None:
    assert differing([*corpus, *RAMP, f"precision={precision}"]) == ([], 1)


def test_grouped_queries_have_them_too(corpus: list[str]) -> None:
    assert differing([*corpus, *GROUPED, "batch.sequences=4", "precision=fp8", "seq_len=32"]) == ([], 1)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "node_limited"])
def test_ranks_that_share_experts_have_them_too(corpus: list[str], dispatcher: str) -> None:
    """Messages stand between the graphs: two ways of four messages, each started and waited for, in three blocks."""
    settings = [*corpus, *RAMP, "precision=fp8", "batch.micro_batch=1", "parallel.capacity_factor=8.0"]
    layout = [f"parallel.dispatcher={dispatcher}", "parallel.ranks_per_node=1", "optimizer.sharding=none"]
    for differs, graphs in run_ranks(differing, 2, [*settings, *layout], 2):
        assert differs == []
        assert graphs > 1
        print(graphs)
