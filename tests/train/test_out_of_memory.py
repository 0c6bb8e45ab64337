"""A failed allocation in a step: exit code 4, and a sentence with its cause, what is held, and what lowers that first.

A failure is a petabyte, which the real allocator of the CPU refuses, asked for where the cause would ask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fp8moe.cli.command import explain
from fp8moe.errors import EXIT, OutOfMemoryError, is_out_of_memory
from fp8moe.train.config import TrainConfig
from fp8moe.train.loop import run_to_end
from fp8moe.train.memory import KINDS, measured_bytes
from fp8moe.train.out_of_memory import (
    ACTIVATIONS,
    CAUSES,
    IMBALANCE,
    LOGITS,
    OPTIMIZER,
    WEIGHTS,
    cause_of,
    out_of_memory_in_words,
    received_share,
    savings,
)
from fp8moe.train.run import Run
from tests.train.runs import built, configured, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return built(configured(write_corpus(folder), "precision=fp8", "seq_len=64", f"run_dir={folder / 'run'}"))


@pytest.fixture(autouse=True)
def large_peak(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loads, and more memory held than this small model has: the figure of a test's process says nothing."""
    for router in run.routers().values():
        router.counts_E.zero_()
    monkeypatch.setattr("fp8moe.train.out_of_memory.memory_bytes", lambda _: 1 << 40)


def failing(*args: object, **kwargs: object) -> Any:
    torch.empty(1 << 50, dtype=torch.uint8)


def said_of(run: Run) -> str:
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory_in_words(run):
        run_to_end(run, 0.0)
    failure = explain(caught.value)
    assert failure.code == EXIT["memory"] == 4 and not failure.traceback and not failure.shared
    assert "\n" not in failure.sentence and "alloc_cpu" not in failure.sentence and ".cpp" not in failure.sentence
    return failure.sentence


def test_the_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.train.step.train_passes", failing)
    said = said_of(run)
    assert said.startswith("out of memory in step 1 on rank 0 (") and "allocate 1125899906842624 bytes" in said
    assert f"), most likely by {ACTIVATIONS}: it holds " in said
    assert ", and activations and messages beside: use batch.micro_batch=1, or recompute=[norm,mla_up,swiglu]" in said
    held = measured_bytes(run.model, run.optimizer)
    assert all(held[kind] for kind in KINDS)
    for kind in KINDS:
        assert f"{kind} {held[kind] / 1e9:.3g}" in said


@pytest.mark.parametrize(
    ("where", "cause", "first"),
    [
        ("fp8moe.model.head_loss.cross_entropy_with_gradient", LOGITS, "use batch.micro_batch=1, or"),
        ("fp8moe.layers.attention.mla.attend", ACTIVATIONS, "use batch.micro_batch=1, or"),
        ("fp8moe.layers.moe.gated_mlp", ACTIVATIONS, "use batch.micro_batch=1, or"),
        (
            "fp8moe.train.optimizer.adamw.adamw_step",
            OPTIMIZER,
            "use more data-parallel ranks, which share them out, or",
        ),
    ],
)
def test_where_it_failed_is_the_cause(
    where: str, cause: str, first: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, failing)
    if cause is OPTIMIZER:
        monkeypatch.setattr("fp8moe.train.optimizer.adamw.adamw_step_quantize", failing)
    said = said_of(run)
    assert f"most likely by {cause}: it holds" in said and first in said


def test_uneven_experts_are_the_cause(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank's experts, two of four, got 3 of 4 choices: 1.5 times their share."""
    config = dataclasses.replace(run.config, parallel=dataclasses.replace(run.config.parallel, ep=2, dp=2))
    uneven = dataclasses.replace(run, config=config)
    (router, *_) = uneven.routers().values()

    def failed(*args: object) -> None:
        router.counts_E.copy_(torch.tensor([200, 100, 60, 40]))
        failing()

    monkeypatch.setattr("fp8moe.train.step.train_passes", failed)
    said = said_of(uneven)
    assert f"most likely by {IMBALANCE}, 1.5 times an even share for this rank's: it holds" in said
    assert ": use a faster balance (model.router.bias_gamma above 0.001), or batch.micro_batch=1, or " in said
    assert received_share(uneven) == 1.5
    router.counts_E.copy_(torch.tensor([100, 100, 100, 100]))
    assert received_share(uneven) == 1.0
    router.counts_E.zero_()
    assert received_share(uneven) == 1.0


def test_what_lives_from_step_to_step_is_the_cause(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.train.step.train_passes", failing)
    held = measured_bytes(run.model, run.optimizer)
    monkeypatch.setattr("fp8moe.train.out_of_memory.memory_bytes", lambda _: sum(held.values()) + 1)
    said = said_of(run)
    assert held["masters"] + held["moments"] > sum(held.values()) / 2, "in this run"
    assert f"most likely by {OPTIMIZER}: it holds" in said and ": use more data-parallel ranks, which share" in said


def test_the_cause_by_figures() -> None:
    state = {"weights": 2, "FP8 blocks": 2, "gradients": 4, "masters": 4, "moments": 4}
    assert cause_of(None, 1.0, state, 40) == ACTIVATIONS
    assert cause_of(None, 1.0, state, 20) == WEIGHTS
    assert cause_of(None, 1.0, state | {"moments": 8}, 20) == OPTIMIZER
    assert cause_of(None, 1.5, state, 20) == IMBALANCE and cause_of(None, 1.49, state, 20) != IMBALANCE
    assert cause_of(LOGITS, 9.0, state, 20) == LOGITS
    assert len(set(CAUSES)) == 5


def test_the_first_setting_lowers_the_cause(run: Run) -> None:
    def all_of(cause: str, **changes: Any) -> list[str]:
        config: TrainConfig = run.config
        for key, value in changes.items():
            group, _, name = key.partition("__")
            config = dataclasses.replace(
                config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
            )
        return savings(cause, config)

    def first(cause: str, **changes: Any) -> str:
        return all_of(cause, **changes)[0]

    shared_out = [all_of(ACTIVATIONS, parallel__dp=dp, optimizer__sharding="none") for dp in (1, 4)]
    assert ["optimizer.sharding=zero1" in settings for settings in shared_out] == [False, True]
    assert first(OPTIMIZER, parallel__dp=4, optimizer__sharding="none") == "optimizer.sharding=zero1"
    assert first(OPTIMIZER, optimizer__sharding="none", optimizer__moments="fp32") == "optimizer.moments=bf16"
    assert first(OPTIMIZER, optimizer__sharding="none") == "optimizer=muon, with one moment"
    assert first(WEIGHTS, parallel__dp=4) == "parallel.ep=2"
    assert first(WEIGHTS, parallel__dp=8, parallel__ep=4) == "parallel.pp=2 on twice the ranks"  # of 4 experts
    assert first(LOGITS, batch__micro_batch=1) == "recompute=[norm,mla_up,swiglu]"
    assert first(LOGITS, batch__micro_batch=1, parallel__pp=2) == "fewer blocks beside the head (parallel.layout)"
    assert first(LOGITS, batch__micro_batch=4, parallel__pp=2) == "batch.micro_batch=2"
    assert first(ACTIVATIONS, batch__micro_batch=1) == "recompute=[norm,mla_up,swiglu]"
    router = dataclasses.replace(run.config.model.router, bias_gamma=0.0)
    assert first(IMBALANCE, model__router=router).startswith(
        "a stronger balance loss (model.router.aux_loss_alpha above "
    )
    for cause in CAUSES:
        assert savings(cause, run.config)[-1] == "more ranks (parallel.pp, parallel.ep)"
        assert len(set(savings(cause, run.config))) == len(savings(cause, run.config))


def test_other_errors_pass(run: Run) -> None:
    for error in (RuntimeError("gloo"), ValueError("no"), OutOfMemoryError("said already")):
        with pytest.raises(type(error)) as caught, out_of_memory_in_words(run):
            raise error
        assert caught.value is error
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")):
        assert is_out_of_memory(error)
        with pytest.raises(OutOfMemoryError, match="out of memory in step 1 on rank 0"), out_of_memory_in_words(run):
            raise error
