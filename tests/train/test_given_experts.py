"""Given experts through a step: phases are ordinary autograd, every layout takes the one-process step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from fp8moe.data.packing import Batch
from fp8moe.layers.linear import main_grad_of
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.batch import microbatches_of, share_of, to_device
from fp8moe.train.run import Run
from fp8moe.train.step import forward_backward, reduce
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

SEQUENCES, LAYERS = 4, 2
SETTINGS = (
    *("model.num_layers=4", "model.num_dense_layers=1", "model.dense_layers=[2]", "model.router.aux_loss_alpha=0.1"),
    *(f"batch.sequences={SEQUENCES}", "batch.micro_batch=1", "seed=3", "precision=fp32", "model.mtp_depth=1"),
)


def with_experts(run: Run, batch: Batch, seed: int) -> Batch:
    """Experts at random, a fifth of the tokens without."""
    c, shape = run.config.model, batch.inputs_BS.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape, LAYERS, c.experts.num_experts, generator=generator).argsort(-1)
    experts_BSLK = order[..., : c.router.topk].to(torch.int16)
    experts_BSLK[:, ::5] = -1
    return replace(batch, experts_BSLK=experts_BSLK)


def batches_of(run: Run) -> tuple[list[Batch], LossCounts]:
    """All sequences, of which this rank has its share; what they predict."""
    whole = [run.data.train.batch(ids) for ids in microbatches_of(range(SEQUENCES), 1)]
    counts = LossCounts(sum(int(count_predicted(one.labels_BS)[0]) for one in whole), 1, SEQUENCES)
    given = [with_experts(run, one, number) for number, one in enumerate(whole)]
    return [share_of(one, run.mesh.cp_rank, run.mesh.cp) for one in given], counts


def one_step(settings: tuple[str, ...], world_size: int) -> tuple[list[float], dict[str, list[int]]]:
    """Losses and gradient norm of a step, and the loads of the routers that are here."""
    run = built(configured([], *settings, world_size=world_size))
    batches, counts = batches_of(run)
    losses = forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    norm = reduce(run)
    loads = {name: router.counts_E.tolist() for name, router in run.routers().items()}
    return [losses.main, losses.mtp, losses.balance, norm], loads


@cache
def alone(settings: tuple[str, ...]) -> tuple[list[float], dict[str, list[int]]]:
    return one_step(settings, 1)


@pytest.mark.parametrize("layout", [("parallel.cp=2",), ("parallel.pp=2", "parallel.schedule=dualpipev")])
def test_every_layout_takes_the_one_process_step(layout: tuple[str, ...], corpus: list[str]) -> None:
    settings = (*corpus, *SETTINGS)
    expected, loads = alone(settings)
    found = run_ranks(one_step, 2, (*settings, *layout), 2)
    for values, of_rank in found:
        assert values == pytest.approx(expected, rel=1e-5)
        assert of_rank.items() <= loads.items()
    assert {name for _, of_rank in found for name in of_rank} == loads.keys()


def test_phases_are_ordinary_autograd_and_the_experts_matter(corpus: list[str]) -> None:
    run, other, free = (built(configured([*corpus, *SETTINGS, "parallel.schedule=dualpipev"])) for _ in range(3))
    batches, counts = batches_of(run)
    forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    weights = loss_weights(counts, mtp_weight=0.3, balance_alpha=run.config.model.router.aux_loss_alpha)
    for batch in batches:
        total_loss(other.model(batch), weights).backward()
    own = [replace(batch, experts_BSLK=None) for batch in batches]
    forward_backward(free, own, counts, 0.3, Stopwatch(run.device))
    each = zip(run.model.named_parameters(), other.model.named_parameters(), free.model.named_parameters(), strict=True)
    for (name, one), (_, same), (_, another) in each:
        assert torch.equal(main_grad_of(one), main_grad_of(same)), name
        assert not torch.equal(main_grad_of(one), main_grad_of(another)), name


def test_experts_go_to_a_device_with_the_batch(corpus: list[str]) -> None:
    run = built(configured([*corpus, *SETTINGS]))
    moved = to_device(batches_of(run)[0][0], torch.device("meta"))
    assert moved.experts_BSLK is not None and moved.experts_BSLK.device.type == "meta"
