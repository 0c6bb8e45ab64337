"""Training of GPT-OSS: every layout does the one-process step, biases of experts included; FP8 depends on none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import run_ranks
from tests.train.test_pipeline import check, one_step, steps_that_differ

GPT_OSS = (
    "model=gpt_oss_20b", "model.dim=48", "model.num_layers=4", "model.attention.num_heads=6",
    "model.attention.num_kv_heads=2", "model.attention.head_dim=16", "model.attention.rope_dim=16",
    "model.attention.window=5", "model.experts.num_experts=4", "model.experts.hidden=32",
    "model.experts.swiglu_limit=0.05", "model.router.topk=2", "model.vocab_size=300", "seq_len=16",
    "batch.sequences=16", "batch.micro_batch=1", "validation.samples=16", "run_dir=null", "device=cpu",
    "parallel.timeout=60", "seed=5", "steps=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(corpus: list[str]) -> list[str]:
    return [*corpus, *GPT_OSS]


def test_fp32_step_is_the_one_process_step(settings: list[str]) -> None:
    words = [*settings, "precision=fp32"]
    alone: dict[str, Any] = one_step(words, 1)
    assert alone["gap"] > 1e-5, f"two experts nearly tie ({alone['gap']:.1e}): choose another seed"
    own = [name for name in alone["grads"] if name.endswith(("_bias", "sinks"))]
    assert len(own) == 6 * 4 and all(alone["grads"][name][0][1].any() for name in own)
    layout = ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev"]
    check(run_ranks(one_step, 4, [*words, *layout], 4), alone, mtp_tied=False)


def test_overlap_and_recomputation_change_no_bit_in_fp8(settings: list[str]) -> None:
    words = [*settings, "precision=fp8", "parallel.ep=2", "parallel.schedule=dualpipev", "batch.sequences=8"]
    others = [["recompute=[norm,mla_up,swiglu]"]]
    assert run_ranks(steps_that_differ, 2, words, others, 2) == [[], []]
