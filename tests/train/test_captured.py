"""A captured micro-batch is the micro-batch: losses, gradients and weights of several steps, bit for bit."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fp8moe.layers.linear import Linear, quantize_weights
from fp8moe.model.head_loss import ChunkLoss
from fp8moe.model.loss import LossTally
from fp8moe.profile.spans import CAPTURED, Recorder, listening
from fp8moe.train import build
from fp8moe.train.captured import CapturedMicroBatch, make_captured
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.recorded_graph import RecordedGraph, as_on_a_gpu
from tests.train.runs import built, configured, stored
from tests.train.test_families import GROUPED

GRAPHS = "parallel.cuda_graphs=true"
RAMP = ("batch.ramp_from=4", "batch.ramp_samples=8", "batch.increment=4")
STEPS = 3  # of 2, 2 and 4 micro-batches; losses of the third have other weights than those of the capture
REPORTED = ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_violation", "tokens")
made: list[RecordedGraph] = []


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded, by a CPU that does what a GPU would."""

    def make_recorded(parallel: Any, model: Any, device: torch.device, zero: Any) -> CapturedMicroBatch | None:
        return CapturedMicroBatch(model, device, zero, lambda: make_graph) if parallel.cuda_graphs else None

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(build, "make_captured", make_recorded)
    made.clear()


def make_graph() -> RecordedGraph:
    made.append(RecordedGraph())
    return made[-1]


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


SHARED = ("parallel.dispatcher=node_limited", "parallel.ranks_per_node=1", "parallel.capacity_factor=8.0")


@pytest.mark.parametrize(
    ("layout", "graphs"), [((*SHARED, "parallel.chunks=2"), 17), (("parallel.ep=1",), 1)], ids=["experts", "replicas"]
)
def test_ranks_have_them_too(corpus: list[str], layout: tuple[str, ...], graphs: int) -> None:
    """Messages to experts stand between the graphs: two mixtures, four in each, each started and waited for.

    The optimizer's state is shared: its messages stand before and behind all graphs.
    """
    settings = [*corpus, *RAMP, "precision=fp8", "batch.micro_batch=1", *layout]
    assert run_ranks(differing, 2, settings, 2) == [([], graphs)] * 2


def captured_run(corpus: list[str], *settings: str) -> Run:
    """A run behind its first step, which is never captured."""
    run = built(configured([*corpus, "batch.micro_batch=4", GRAPHS, *settings]))
    train_step(run)
    assert made == []
    return run


def test_what_lies_elsewhere_is_captured_again(corpus: list[str]) -> None:
    run = captured_run(corpus, "precision=fp8")
    for _ in range(2):
        train_step(run)
    assert len(made) == 1
    quantize_weights(run.model)  # as a rollback does: to where the blocks were
    train_step(run)
    assert len(made) == 1
    linear = next(module for module in run.model.modules() if isinstance(module, Linear) and module.recipe.fp8)
    linear.blocks_lie_still = False
    linear.quantize()
    for _ in range(2):
        train_step(run)
    assert len(made) == 2


def test_a_step_that_no_graph_can_do_runs_without_and_lets_it_go(corpus: list[str]) -> None:
    run = captured_run(corpus, "precision=fp8")
    train_step(run)
    graph = weakref.ref(made.pop())
    report = train_step(run, count_fp8=True)
    assert report.fp8_underflow_share is not None and made == []
    gc.collect()
    assert graph() is None
    train_step(run)
    assert len(made) == 1
    assert run.captured is not None
    assert not run.captured.takes(cast(ChunkLoss, object()))


def test_time_of_a_replay_is_the_backwards(corpus: list[str]) -> None:
    """And nobody hears of phases, whose times a capture has not: on a GPU their events would be captured."""
    run = captured_run(corpus, "precision=fp32")
    for _ in range(2):  # a capture, then replays
        with listening(recorder := Recorder()):
            time = train_step(run).time
        assert time.forward == 0 and time.backward > 0
        names = [one.name for one in recorder.spans]
        assert names.count(CAPTURED) == 2 and not [name for name in names if name.startswith(("F", "B", "W"))]


def test_a_host_that_reads_is_found(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = captured_run(corpus, "precision=fp32")
    add_losses = LossTally.add_losses
    monkeypatch.setattr(LossTally, "add_losses", lambda tally, main, *mtp: add_losses(tally, main * float(main), *mtp))
    with pytest.raises(AssertionError, match="the host reads by aten::_local_scalar_dense"):
        train_step(run)


@pytest.mark.parametrize(
    ("settings", "world_size", "sentence"),
    [
        (["parallel.pp=2"], 2, r"parallel\.pp=2 sends other messages within it: use parallel\.pp=1"),
        (["parallel.cp=2"], 2, r"parallel\.cp=2 sends"),
        ([], 2, r"parallel\.capacity_factor=null gives each other numbers of rows: use parallel\.capacity_factor=1\.5"),
        (["parallel.capacity_factor=2.0", "parallel.dispatcher=deep_ep"], 2, r"dispatcher=deep_ep counts its rows"),
        (["optimizer.sharding=deepspeed", "optimizer.moments=fp32"], 1, r"optimizer\.sharding=deepspeed"),
        (["parallel.schedule=dualpipev"], 1, r"parallel\.schedule=dualpipev mixes several"),
        (["data.document_mask=true"], 1, r"data\.document_mask=true gives each other launches"),
        (["distill.teacher=somewhere"], 1, r"distill\.teacher brings each a loss that Python computes"),
        (
            ["profile=true"],
            1,
            r"profile=true shows the phases within it: use profile=false, or parallel\.cuda_graphs=false",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(
    corpus: list[str], settings: list[str], world_size: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        configured([*corpus, GRAPHS, *settings], world_size=world_size)
    without = [one for one in settings if "sharding" not in one and "deep_ep" not in one]
    configured([*corpus, *without], world_size=world_size)


def test_a_cpu_has_no_graphs(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "make_captured", make_captured)
    with pytest.raises(ValueError, match=r"cuda_graphs=true needs a GPU and the model is on the cpu: use .*=false"):
        built(configured([*corpus, GRAPHS]))
