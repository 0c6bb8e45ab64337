"""One step: the same for any split of the batch, untouched weights when skipped, honest figures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fp8moe.errors import ImbalanceError, NonFiniteError
from fp8moe.layers.attention.mla import LatentAttention
from fp8moe.layers.experts import Experts
from fp8moe.layers.mlp import Mlp, swiglu
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Precision
from fp8moe.train.metrics import StepReport
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured


def steps(settings: list[str], number: int, world_size: int = 1) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Reports and final masters of the first steps of a run."""
    run = built(configured(settings, world_size=world_size))
    reports = [train_step(run) for _ in range(number)]
    return reports, {name: state.master for name, state in run.optimizer.states.items()}


def test_neither_micro_batches_nor_ranks_change_a_step(corpus: list[str]) -> None:
    settings = [*corpus, "precision=fp32", "optimizer.moments=fp32", "data.document_mask=true"]
    expected, masters = steps([*settings, "batch.micro_batch=8"], 2)
    for other in (steps([*settings, "batch.micro_batch=1"], 2), *run_ranks(steps, 2, settings, 2, 2)):
        for ours, theirs in zip(expected, other[0], strict=True):
            assert theirs.loss == pytest.approx(ours.loss, rel=1e-6)
            assert theirs.mtp_loss == pytest.approx(ours.mtp_loss, rel=1e-6)
            assert theirs.aux_loss == pytest.approx(ours.aux_loss, rel=1e-5)
            assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-5)
            assert (theirs.tokens, theirs.consumed_samples) == (ours.tokens, ours.consumed_samples)
            assert theirs.max_violation == pytest.approx(ours.max_violation)
        for name, master in other[1].items():
            if "experts" not in name:  # a rank of two holds half of them
                assert torch.allclose(master, masters[name], atol=1e-5), name
    assert expected[0].consumed_samples == 8 and expected[1].consumed_samples == 16
    assert expected[0].tokens < 8 * 32  # the document mask leaves some tokens unpredicted


@pytest.mark.parametrize(
    "dispatcher",
    [
        ["parallel.dispatcher=node_limited", "parallel.ranks_per_node=2", "parallel.chunks=2"],
        ["parallel.capacity_factor=8.0", "parallel.chunks=3"],
        ["parallel.dispatcher=node_limited", "parallel.ranks_per_node=2", "parallel.capacity_factor=8.0"],
    ],
)
def test_no_dispatcher_changes_a_step(corpus: list[str], dispatcher: list[str]) -> None:
    settings = [*corpus, "precision=fp32", "optimizer.moments=fp32"]
    (expected,), _ = steps([*settings, "batch.micro_batch=8"], 1)
    for (ours,), _ in run_ranks(steps, 4, [*settings, *dispatcher], 1, 4):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def overflowing(settings: list[str]) -> str:
    run = built(configured(settings, world_size=4))
    before = [state.master.clone() for state in run.optimizer.states.values()]
    for router in run.routers().values():
        router.bias_E[:2] = 10.0  # all tokens to two experts
    with pytest.raises(ImbalanceError) as caught:
        train_step(run)
    after = [state.master for state in run.optimizer.states.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return str(caught.value)


def test_an_overflow_ends_the_run_before_the_step(corpus: list[str]) -> None:
    for said in run_ranks(overflowing, 4, [*corpus, "parallel.capacity_factor=1.0"]):
        assert "parallel.capacity_factor=1.0 has room for, and no step is taken" in said


def test_the_model_recomputes_what_the_configuration_says(corpus: list[str]) -> None:
    for names in ("[]", "[norm]", "[mla_up,norm]"):
        modules = list(built(configured(corpus, "precision=bf16", f"recompute={names}")).model.modules())
        assert {m.recompute for m in modules if isinstance(m, RMSNorm)} == {"norm" in names}
        assert {m.recompute for m in modules if isinstance(m, LatentAttention)} == {"mla_up" in names}
        keeping = {m.act for m in modules if isinstance(m, (Mlp, Experts))}
        assert keeping == {swiglu(Precision.BF16, recompute=frozenset())}


def test_figures_of_an_fp8_step(corpus: list[str]) -> None:
    run = built(configured(corpus))
    report = train_step(run, count_fp8=True)
    assert report.fp8_saturated_share == 0.0 and 0.0 <= report.fp8_underflow_share < 0.5
    assert train_step(run).fp8_saturated_share is None  # counted when asked only
    # An untrained model knows nothing; each loss by its own count of tokens (31 of 32 positions have a next but one).
    assert report.loss == pytest.approx(math.log(300), rel=0.015)
    assert report.mtp_loss == pytest.approx(math.log(300), rel=0.015)
    assert report.step == 1 and report.mfu is None and report.memory_bytes > 2**20
    parts = dataclasses.asdict(report.time)
    assert all(value >= 0 for value in parts.values()) and 0 < sum(parts.values()) <= report.seconds
    assert parts["forward"] > 0 and parts["backward"] > 0 and parts["exposed_communication"] == 0
    assert report.tokens_per_second == pytest.approx(8 * 32 / report.seconds)
    assert sum(int(load.sum()) for load in run.loads.values()) == 2 * 2 * 2 * 8 * 32  # steps x layers x top-k x tokens


def test_a_skipped_step_moves_nothing_but_the_data(corpus: list[str]) -> None:
    run = built(configured(corpus, "max_skipped_steps=1"))
    train_step(run)
    before = {name: tensor.clone() for name, _, tensor in run.optimizer.tensors()}
    biases = {name: router.bias_E.clone() for name, router in run.routers().items()}
    loads = {name: load.clone() for name, load in run.loads.items()}
    with torch.no_grad():
        run.model.norm.weight.fill_(math.nan)
    report = train_step(run)
    assert report.skipped and math.isnan(report.loss)
    assert (run.step, run.sampler.consumed, run.optimizer.updates, run.guard.skipped) == (2, 16, 1, 1)
    for name, _, tensor in run.optimizer.tensors():
        assert torch.equal(tensor, before[name]), name
    for name, router in run.routers().items():
        assert torch.equal(router.bias_E, biases[name]) and torch.equal(run.loads[name], loads[name])
        assert not router.counts_E.any()
    with pytest.raises(NonFiniteError, match="step 3"):
        train_step(run)


def test_the_bias_stands_still_at_the_end(corpus: list[str]) -> None:
    run = built(configured(corpus, "optimizer.schedule.bias_gamma_until=0.3", "steps=6"))
    for _ in range(2):
        train_step(run)
    moved = {name: router.bias_E.clone() for name, router in run.routers().items()}
    assert all(bias.any() for bias in moved.values())
    train_step(run)
    assert all(torch.equal(router.bias_E, moved[name]) for name, router in run.routers().items())
