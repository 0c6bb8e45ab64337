"""The micro-batch that nobody set: the largest that fits, found again by trying each size."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.plan.micro_batch import IMBALANCE, choose_for, choose_micro_batch
from fp8moe.plan.teacher import TeacherModel
from fp8moe.train.config import TrainConfig, resolve


def recipe(*settings: str) -> TrainConfig:
    words = ["experiment=dsv2_lite_8gpu", "data.paths=[a]", "batch.micro_batch=null", "validation.samples=4096"]
    words += ["parallel.schedule=1f1b", "recompute=[norm,mla_up,swiglu]"]
    return compose([*words, *settings]).config


def needed(config: TrainConfig, size: int, imbalance: float) -> float:
    """Bytes of the worst rank with that micro-batch, by a configuration that is resolved as a run's is."""
    typed = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batch=size))
    return worst_rank(rank_memory(resolve(typed, 8), imbalance=imbalance)).total


@pytest.mark.parametrize("gigabytes", [60, 80, 140])
@pytest.mark.parametrize("settings", [(), ("parallel.max_imbalance=2.0",), ("parallel.pp=2", "parallel.ep=4")])
def test_it_is_the_largest_that_fits(gigabytes: int, settings: tuple[str, ...]) -> None:
    config = recipe(*settings)
    found = choose_for(config, 8, 8, gigabytes * 10**9)
    assert found.config.batch.micro_batch is not None and found.sentence
    imbalance = config.parallel.max_imbalance or IMBALANCE
    fitting = [size for size in (1, 2, 4, 8, 16, 32, 64) if needed(config, size, imbalance) <= gigabytes * 1e9]
    assert found.config.batch.micro_batch == max(fitting)
    assert dataclasses.replace(found.config, batch=config.batch) == config, "nothing else changes"
    said = f"batch.micro_batch={max(fitting)}: the largest that fits a GPU of {gigabytes} GB by the formulas ("
    assert found.sentence.startswith(said) and "\n" not in found.sentence


def test_where_none_fits_it_is_the_smallest_and_said() -> None:
    found = choose_for(recipe(), 8, 8, 40 * 10**9)
    assert found.config.batch.micro_batch == 1
    assert found.sentence is not None and "the smallest, which does not fit a GPU of 40 GB" in found.sentence


def test_a_size_suits_validation_and_fp8() -> None:
    """By the defaults 64 samples are validated: a micro-batch of 8 on 8 ranks at most."""
    found = choose_for(recipe("validation.samples=32"), 8, 8, 10**12)
    assert found.config.batch.micro_batch == 4
    resolve(found.config, 8)
    tiny = ("model=tiny", "parallel.ep=1", "seq_len=24", "validation.samples=64", "batch.sequences=16")
    assert choose_for(recipe(*tiny), 1, 1, 10**9).config.batch.micro_batch == 16  # 24 x 2n tokens are multiples of 16


def test_what_is_wrong_otherwise_is_left_to_resolve() -> None:
    for processes, settings in ((4, ()), (8, ("parallel.pp=16",)), (8, ("parallel.ep=3",))):
        config = recipe(*settings)
        assert choose_for(config, processes, 8, 10**12).config == config


def test_only_where_a_gpu_is_used_and_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_micro_batch(config, 8, 8) == choose_micro_batch(config, 8, 8).__class__(config, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=80_600_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    chosen = choose_micro_batch(config, 8, 8)
    assert chosen == choose_for(config, 8, 8, 80 * 10**9) and chosen.sentence
    assert choose_micro_batch(dataclasses.replace(config, device="cpu"), 8, 8).sentence is None
    typed = recipe("batch.micro_batch=1")
    assert choose_micro_batch(typed, 8, 8).config == typed


def test_a_teacher_takes_its_part_and_stays_out_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("distill.teacher=a", "device=auto")
    teacher = TeacherModel(config.model, config.recipe)
    sizes = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes)
    alone = choose_micro_batch(recipe("device=auto"), 8, 8).config.batch.micro_batch
    taught = choose_micro_batch(config, 8, 8, teacher)
    assert type(taught.config) is TrainConfig and taught.config.batch.micro_batch is not None and alone is not None
    assert taught.config.batch.micro_batch < alone
