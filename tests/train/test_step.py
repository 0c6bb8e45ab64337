"""One step: the same for any split of the batch, untouched weights when skipped, honest figures."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.errors import ImbalanceError
from fp8moe.layers.attention.mla import LatentAttention
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import Experts
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Recompute
from fp8moe.profile.spans import Stopwatch
from fp8moe.train import build
from fp8moe.train.cast_shares import KINDS, Shares, cast_shares
from fp8moe.train.lr import LearningRateConfig, Progress, learning_rate
from fp8moe.train.metrics import StepReport
from fp8moe.train.step import (
    Losses,
    forward_backward,
    next_batches,
    sms_for_gemms,
    train_step,
    worst_violation,
)
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, kept, weights_of


def steps(settings: list[str], number: int, world_size: int = 1) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Reports of the first steps of a run, and its weights after them."""
    run = built(configured(settings, world_size=world_size))
    reports = [train_step(run) for _ in range(number)]
    return reports, weights_of(run)


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
    before = weights_of(run)
    for router in run.routers().values():
        router.bias_E[:2] = 10.0  # all tokens to two experts
    with pytest.raises(ImbalanceError) as caught:
        train_step(run)
    after = weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


def test_an_overflow_ends_the_run_before_the_step(corpus: list[str]) -> None:
    for said in run_ranks(overflowing, 4, [*corpus, "parallel.capacity_factor=1.0"]):
        assert "parallel.capacity_factor=1.0 has room for, so no step is taken" in said


def test_the_model_recomputes_what_the_configuration_says(corpus: list[str]) -> None:
    for names in ("[]", "[norm]", "[mla_up,norm]"):
        modules = list(built(configured(corpus, "precision=bf16", f"recompute={names}")).model.modules())
        assert {m.recompute for m in modules if isinstance(m, RMSNorm)} == {"norm" in names}
        for kind in (LatentAttention, Mlp, Experts):
            found = {m.recipe.recompute for m in modules if isinstance(m, kind)}
            assert found == {frozenset(Recompute(name) for name in names[1:-1].split(",") if name)}


def test_each_loss_is_divided_by_its_own_count(corpus: list[str]) -> None:
    """Three different counts: next tokens, next but one, sequences; losses and gradients against autograd by hand."""
    alpha, weight = 0.05, 0.7
    settings = ["precision=fp32", "data.document_mask=true", f"model.router.aux_loss_alpha={alpha}"]
    run = built(configured(corpus, *settings))
    batches, counts = next_batches(run)
    assert counts.main_tokens > counts.mtp_tokens > counts.sequences == 8

    def gradients() -> list[Tensor]:
        return [p.main_grad.clone() for p in run.model.parameters()]  # type: ignore[attr-defined]

    losses = forward_backward(run, batches, counts, weight, Stopwatch(run.device))
    ours = gradients()
    run.model.main_grads.zero_()
    sums = [run.model(batch) for batch in batches]
    main = sum(each.main for each in sums) / counts.main_tokens
    mtp = sum(each.mtp for each in sums) / counts.mtp_tokens
    balance = sum(each.balance for each in sums) / 8
    (main + weight * mtp + alpha * balance).backward()
    assert losses.main == pytest.approx(float(main.detach()), rel=1e-6)
    assert losses.mtp == pytest.approx(float(mtp.detach()), rel=1e-6)
    assert losses.balance == pytest.approx(float(balance.detach()), rel=1e-6)
    for grad, theirs in zip(ours, gradients(), strict=True):
        assert torch.allclose(grad, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def test_what_changes_along_the_run_reaches_the_step(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = ("peak=0.5", "warmup_steps=4", "mtp_weight_until=0.3", "mtp_weight_after=0.01", "bias_gamma_until=0.6")
    run = built(
        configured(corpus, "steps=6", "precision=bf16", *(f"optimizer.schedule.{setting}" for setting in schedule))
    )
    weights: list[float] = []
    given = forward_backward

    def recording(run, batches, counts, weight, stopwatch, token_loss):  # type: ignore[no-untyped-def]
        weights.append(weight)
        return given(run, batches, counts, weight, stopwatch, token_loss)

    places: list[Progress] = []

    def recording_rate(config: LearningRateConfig, at: Progress) -> float:
        places.append(at)
        return learning_rate(config, at)

    monkeypatch.setattr("fp8moe.train.step.forward_backward", recording)
    monkeypatch.setattr("fp8moe.train.step.learning_rate", recording_rate)
    rates, moved = [], []
    for _ in range(5):
        before = [router.bias_E.clone() for router in run.routers().values()]
        rates.append(train_step(run).lr)
        after = [router.bias_E for router in run.routers().values()]
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    cosine = 0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 6)))
    assert rates[0] == pytest.approx(0.5 / 4) and rates[4] == pytest.approx(cosine)  # a whole cosine, to a tenth
    assert places == [Progress(step, 6, step * 8 * 32) for step in range(5)]
    assert weights == [0.3, 0.3, 0.01, 0.01, 0.01] and moved == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("losses", "grad_norm"),
    [
        *((Losses(math.nan, 1.0, 1.0), 1.0), (Losses(1.0, math.nan, 1.0), 1.0)),
        *((Losses(1.0, 1.0, math.inf), 1.0), (Losses(1.0, 1.0, 1.0), math.inf)),
    ],
)
def test_any_figure_that_is_not_finite_skips_the_step(
    corpus: list[str], losses: Losses, grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(configured(corpus, "precision=bf16"))
    monkeypatch.setattr("fp8moe.train.step.forward_backward", lambda *arguments: losses)
    monkeypatch.setattr("fp8moe.train.step.reduce", lambda run: grad_norm)
    assert train_step(run).skipped and run.optimizer.updates == 0


def differing(settings: list[str]) -> tuple[float | None, tuple[Shares, Shares]]:
    """Worst violation and cast shares of two pipeline ranks that differ in loads and casts; a second layer is even."""
    run = built(configured(settings, world_size=2))
    second = run.mesh.rank == 1
    for layer, router in enumerate(run.routers().values()):
        router.counts_E.copy_(torch.tensor([1, 1, 1, 1] if layer else [3, 1, 1, 1] if second else [5, 1, 1, 1]))
    # (values, saturated, underflowed) of activations, gradients and weights
    counted = ((200, 0, 20), (100, 0, 10), (50, 0, 0)) if second else ((60, 50, 0), (40, 0, 30), (50, 10, 0))
    casts = SimpleNamespace(of_kind=dict(zip(KINDS, counted, strict=True)).get)
    return worst_violation(run), cast_shares(run, casts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_dense", "worst"), [(0, 1.5), (1, 1.0)])  # 5 over a mean of 2; 3 over a mean of 1.5
def test_figures_over_ranks_that_differ(corpus: list[str], num_dense: int, worst: float) -> None:
    """The first rank's only layer has experts or is dense: then the worst is the second rank's."""
    settings = [*corpus, "parallel.pp=2", f"model.num_dense_layers={num_dense}", "precision=bf16"]
    for violation, shares in run_ranks(differing, 2, settings):
        assert violation == pytest.approx(worst)
        saturated, underflowed = shares
        assert saturated.of_step == pytest.approx(50 / 400) and underflowed.of_step == pytest.approx((30 + 30) / 400)
        assert saturated.by_kind == pytest.approx({"activations": 50 / 260, "gradients": 0, "weights": 10 / 100})
        assert underflowed.by_kind == pytest.approx({"activations": 20 / 260, "gradients": 40 / 140, "weights": 0})


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
    before = {name: {kind: t.clone() for kind, t in kinds.items()} for name, kinds in kept(run.optimizer).items()}
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters() if name != "norm.weight"}
    biases = {name: router.bias_E.clone() for name, router in run.routers().items()}
    loads = {name: load.clone() for name, load in run.loads.items()}
    with torch.no_grad():
        run.model.norm.weight.fill_(math.nan)
    report = train_step(run)
    assert report.skipped and math.isnan(report.loss)
    assert (run.step, run.sampler.consumed, run.optimizer.updates, run.guard.skipped) == (2, 16, 1, 1)
    for name, kinds in kept(run.optimizer).items():
        assert all(torch.equal(tensor, before[name][kind]) for kind, tensor in kinds.items()), name
    for name, weight in weights.items():
        assert torch.equal(run.model.get_parameter(name), weight), name
    for name, router in run.routers().items():
        assert torch.equal(router.bias_E, biases[name]) and torch.equal(run.loads[name], loads[name])
        assert not router.counts_E.any()
    assert report.skipped_samples == (8, 15) and run.guard.problem is None
    train_step(run)
    assert run.guard.problem is not None and "step 3: loss nan" in run.guard.problem


@pytest.mark.parametrize(
    ("device", "ep", "communication_sms", "left"),
    [("cuda", 2, 20, 112), ("cuda", 2, 132, 1), ("cuda", 1, 20, None), ("cpu", 2, 20, None)],
)
def test_gemms_of_a_pair_leave_sms_to_its_messages(
    device: str, ep: int, communication_sms: int, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    parallel = SimpleNamespace(communication_sms=communication_sms)
    run = SimpleNamespace(device=torch.device(device), mesh=SimpleNamespace(ep=ep, cp=1), config=SimpleNamespace())
    run.config.parallel = parallel
    assert sms_for_gemms(run) == left  # type: ignore[arg-type]


def test_fixed_messages_are_sized_for_a_micro_batch(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    make = build.make_dispatcher

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.update(options)
        return make(*arguments, **options)

    monkeypatch.setattr(build, "make_dispatcher", noted)
    config = configured(corpus, "batch.micro_batch=2", "parallel.chunks=2", "parallel.capacity_factor=3.0")
    built(config)
    assert asked == {"chunks": 2, "capacity_factor": 3.0, "max_imbalance": None, "max_tokens": 2 * config.seq_len}
