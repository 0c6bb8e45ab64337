"""Train's check on a GPU: what is refused, by how much, and that the layout it names fits and is the nearest."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.errors import ConfigError
from fp8moe.plan import fit
from fp8moe.plan.fitting import legal_layouts
from fp8moe.plan.layouts import changed, layouts
from fp8moe.plan.memory import rank_memory
from fp8moe.plan.teacher import TeacherModel, with_teacher
from fp8moe.train.config import TrainConfig, resolve

WORDS = ["model=dsv2_lite_16b", "seq_len=2048", "batch.sequences=64", "device=auto"]


def need(config: TrainConfig) -> float:
    return max(rank.total for rank in rank_memory(config, gpus_per_node=8))


def refusal(config: TrainConfig, there: float) -> str:
    with pytest.raises(ConfigError) as caught:
        fit.check_gpu(config, int(there), 8)
    return str(caught.value)


def test_the_named_layout_fits_and_is_the_nearest() -> None:
    config = resolve(compose(WORDS).config, 8)
    there = need(config) - 1e8
    sentence = refusal(config, there)
    assert sentence.count("\n") == 0 and "0.1 GB too little: use " in sentence and sentence.endswith("plan=off to try")
    keys = sentence.split(": use ")[1].split(" (")[0].replace("'", "").split()
    again = resolve(compose([*WORDS, *keys]).config, 8)
    assert need(again) <= there and f"({need(again) / 1e9:.1f} GB)" in sentence
    fit.check_gpu(again, int(there), 8)
    fewest = min(len(changed(config, one)) for one in layouts(config, 8, 8) if need(one) <= there)
    assert len(keys) == fewest == 1


def test_harder_cases_change_more() -> None:
    words = [*WORDS, "batch.micro_batch=1", "recompute=[norm,mla_up,swiglu]"]
    config = resolve(compose(words).config, 8)
    legal = legal_layouts(config, 8, 8)
    there = legal.bytes(legal.least()) * 1.001
    keys = refusal(config, there).split(": use ")[1].split(" (")[0].split()
    assert len(keys) > 1 and all(key.startswith("parallel.") for key in keys)
    assert need(resolve(compose([*words, *keys]).config, 8)) <= there


def test_state_that_is_nowhere_shared_out_is_shared_first() -> None:
    words = [
        *WORDS,
        "batch.micro_batch=1",
        "parallel.ep=1",
        "optimizer.sharding=none",
        "recompute=[norm,mla_up,swiglu]",
    ]
    config = resolve(compose(words).config, 8)
    shared = resolve(compose([*words, "optimizer.sharding=zero1"]).config, 8)
    assert "use optimizer.sharding=zero1 (" in refusal(config, need(shared) + 1)


def test_where_no_layout_fits() -> None:
    config = resolve(compose(WORDS).config, 8)
    legal = legal_layouts(config, 8, 8)
    least = legal.bytes(legal.least())
    sentence = refusal(config, least - 1)
    assert f"no layout of 8 GPUs fits, the least needs {least / 1e9:.1f} GB: use more GPUs" in sentence
    assert "use parallel" in refusal(config, least + 1)


def test_rollouts_that_need_too_much_are_fewer_at_once() -> None:
    words = ["experiment=r1_zero", "model=moonlight_16b", "batch.micro_batch=1", "device=auto"]
    config = resolve(compose([*words, "grpo.rollout_batch=512"]).config, 64)
    said = refusal(config, 150e9)
    assert "(rollout caches 138.8, " in said and "GB too little: use grpo.rollout_batch=64 (" in said
    fewer = resolve(compose([*words, "grpo.rollout_batch=64"]).config, 64)
    fit.check_gpu(fewer, int(150e9), 64)
    assert f"({need(fewer) / 1e9:.1f} GB)" in said
    assert list(fit.fewer_rows(config)) == [64, 32, 16] and list(fit.fewer_rows(fewer)) == [32, 16]


def test_updates_that_do_not_fit_either_change_too() -> None:
    words = ["experiment=r1_zero", "model=dsv2_lite_16b", "seq_len=4096", "grpo.max_tokens=2048", "device=auto"]
    words += ["batch.micro_batch=4", "recompute=[norm,mla_up,swiglu]"]
    config = resolve(compose([*words, "grpo.rollout_batch=512"]).config, 8)
    fewest = resolve(compose([*words, "grpo.rollout_batch=16"]).config, 8)
    keys = refusal(config, need(fewest) - 1).split(": use ")[1].split(" (")[0].replace("'", "").split()
    assert keys == ["batch.micro_batch=2", "grpo.rollout_batch=16"]


def test_a_teacher_counts() -> None:
    config = resolve(compose([*WORDS, "distill.teacher=a"]).config, 8)
    teacher = TeacherModel(compose(["model=moonlight_16b"]).config.model, config.recipe)
    there = need(with_teacher(config, teacher)) - 1
    with pytest.raises(ConfigError, match=r": use batch\.micro_batch="):
        fit.check_gpu(with_teacher(config, teacher), int(there), 8)
    assert there > need(replace(config, distill=replace(config.distill, teacher=None))) + 8e9


def test_a_gpus_own_memory_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(compose(WORDS).config, 8)
    sizes = SimpleNamespace(total_memory=int(need(config)) - 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes)
    with pytest.raises(ConfigError, match="and a GPU has"):
        fit.check_fits(config, 8)
    fit.check_fits(resolve(compose([*WORDS, "plan=off"]).config, 8), 8)
    sizes.total_memory += 2
    fit.check_fits(config, 8)
