"""A stage's chain of passes gives what the model gives under autograd, and nothing of it outlives its backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.phase import Pass
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.loss import LossCounts, LossTally, count_predicted, loss_weights, total_loss
from fp8moe.model.partition import partition
from fp8moe.model.stage import StagePasses
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.simulate import peak_held
from tests.model.batches import Tokens, tokens
from tests.model.hf_oracle import BASE
from tests.model.shapes import changed

CONFIG = changed(BASE, num_layers=4, mtp_depth=1)
MICROBATCHES, SEQ_LEN = 4, 24
SCHEDULES = [("1f1b", True), ("zb1p", True), ("dualpipev", True), ("dualpipev", False)]


def built(precision: Precision) -> Transformer:
    model = Transformer(CONFIG, Recipe(precision), LocalDispatcher(CONFIG.experts.num_experts))
    init_weights(model, seed=0)
    return model


def batches() -> list[Tokens]:
    return [tokens(CONFIG.vocab_size, batch=2, seq_len=SEQ_LEN, seed=i) for i in range(MICROBATCHES)]


def counts() -> LossCounts:
    main, mtp = (sum(numbers) for numbers in zip(*(count_predicted(b.labels_BS) for b in batches()), strict=True))
    return LossCounts(main, mtp, sequences=2 * MICROBATCHES)


WEIGHTS = loss_weights(counts(), mtp_weight=0.3, balance_alpha=1e-2)


def pipelined(
    model: Transformer, name: str, overlap: bool, watch: Callable[[Sequence[Pass]], None] = lambda passes: None
) -> Tensor:
    """A step of the schedule on one rank -> the tally; `watch` is shown the passes of each stage and micro-batch."""
    schedule = build_schedule(name, 1, MICROBATCHES)
    stages = partition(CONFIG, schedule.num_stages, seq_len=SEQ_LEN, folded=schedule.is_folded)
    tally = LossTally(torch.device("cpu"))
    make = StagePasses(model, stages, batches(), WEIGHTS, tally)

    def watched(stage: int, microbatch: int, source: Callable[[], Tensor] | None) -> Sequence[Pass]:
        passes = make(stage, microbatch, source)
        watch(passes)
        return passes

    links = Links(Mesh(1, 1, 1, rank=0), timedelta(seconds=1))
    Pipeline(schedule, 0, links, watched, empty=lambda: torch.empty(0), overlap=overlap).run()
    return tally.sums


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("name, overlap", SCHEDULES)
def test_a_step_is_autograds(precision: Precision, name: str, overlap: bool) -> None:
    plain = built(precision)
    expected = torch.zeros(3, dtype=torch.float64)
    for batch in batches():
        sums = plain(batch)
        total_loss(sums, WEIGHTS).backward()
        expected += torch.stack([sums.main, sums.mtp, sums.balance]).detach().double()
    model = built(precision)
    torch.testing.assert_close(pipelined(model, name, overlap), expected, rtol=1e-6, atol=0.0)
    pairs = zip(plain.named_parameters(), model.named_parameters(), strict=True)
    differing = [name for (name, p), (_, q) in pairs if not torch.equal(p.main_grad, q.main_grad)]  # type: ignore[attr-defined]
    assert differing == []


@pytest.fixture
def counted_only() -> Iterator[None]:
    """Memory is let go when the last reference is: no collection of circles, which comes when it comes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name, overlap", SCHEDULES)
def test_passes_are_let_go_without_a_collector(name: str, overlap: bool, counted_only: None) -> None:
    model = built(Precision.BF16)
    made: list[list[weakref.ref[Pass]]] = []
    most = 0

    def watch(passes: Sequence[Pass]) -> None:
        nonlocal most
        made.append([weakref.ref(one) for one in passes])
        most = max(most, sum(any(ref() is not None for ref in refs) for refs in made))

    pipelined(model, name, overlap, watch)
    assert [ref() for refs in made for ref in refs if ref() is not None] == []
    assert most <= peak_held(build_schedule(name, 1, MICROBATCHES))[0]


def test_validation_predicts_one_token_alone() -> None:
    model = built(Precision.FP32)
    model.eval()
    expected = torch.zeros(3, dtype=torch.float64)
    for batch in batches():
        sums = model(batch)
        expected += torch.stack([sums.main, sums.mtp, sums.balance]).detach().double()
    stages, tally = partition(CONFIG, 1, seq_len=SEQ_LEN), LossTally(torch.device("cpu"))
    make = StagePasses(model, stages, batches(), WEIGHTS, tally)
    with torch.no_grad():
        for microbatch in range(MICROBATCHES):
            for phase in (phase for one in make(0, microbatch, None) for phase in one.phases):
                phase.forward()
    assert tally.sums[1] == expected[1] == 0
    assert not bool(model.main_grads.dense.any()), "values alone: nobody asked for a gradient"
    torch.testing.assert_close(tally.sums, expected, rtol=1e-6, atol=0.0)
