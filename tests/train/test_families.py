"""Training of a model with grouped-query attention: every layout does the one-process step; FP8 depends on none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import run_ranks
from tests.train.test_pipeline import check, one_step, steps_that_differ

GROUPED = (
    "model=glm45_air", "model.dim=64", "model.num_layers=4", "model.num_dense_layers=1", "model.dense_layers=[2]",
    "model.dense_hidden=64", "model.attention.num_heads=6", "model.attention.num_kv_heads=2",
    "model.attention.head_dim=16", "model.attention.rope_dim=8", "model.attention.qk_norm=head",
    "model.attention.o_bias=true", "model.experts.num_experts=4", "model.experts.hidden=32", "model.router.topk=2",
    "model.vocab_size=300", "model.router.aux_loss_alpha=0.01", "seq_len=16", "batch.sequences=16",
    "batch.micro_batch=1", "validation.samples=16", "run_dir=null", "device=cpu", "parallel.timeout=60", "seed=5",
    "steps=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(corpus: list[str]) -> list[str]:
    return [*corpus, *GROUPED]


@pytest.fixture(scope="module")
def alone(settings: list[str]) -> dict[str, Any]:
    answer = one_step([*settings, "precision=fp32"], 1)
    assert answer["gap"] > 1e-5, f"two experts nearly tie ({answer['gap']:.1e}): choose another seed"
    biases = [name for name in answer["grads"] if name.endswith("_bias")]
    assert len(biases) == 2 * 5 and all(answer["grads"][name][0][1].any() for name in biases)  # four blocks and MTP's
    return answer


@pytest.mark.parametrize(
    ("schedule", "pp", "dp", "ep"), [("dualpipev", 1, 2, 2), ("dualpipev", 2, 2, 2), ("zb1p", 2, 1, 1)]
)
def test_fp32_step_is_the_one_process_step(
    settings: list[str], alone: dict[str, Any], schedule: str, pp: int, dp: int, ep: int
) -> None:
    words = [*settings, "precision=fp32", f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.schedule={schedule}"]
    check(run_ranks(one_step, pp * dp, words, pp * dp), alone, mtp_tied=schedule == "zb1p")


def test_overlap_and_recomputation_change_no_bit_in_fp8(settings: list[str]) -> None:
    words = [*settings, "precision=fp8", "parallel.ep=2", "parallel.schedule=dualpipev", "batch.sequences=8"]
    others = [["recompute=[norm,mla_up,swiglu]"]]
    assert run_ranks(steps_that_differ, 2, words, others, 2) == [[], []]
