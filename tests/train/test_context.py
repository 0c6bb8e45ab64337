"""Ranks that share sequences take the one-process step: under every layout, schedule and family, with documents."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fp8moe.layers.attention import latent_context
from fp8moe.layers.linear import main_grad_of
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.loss import loss_weights, total_loss
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.step import forward_backward, next_batches
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured
from tests.train.test_families import GROUPED
from tests.train.test_gpt_oss import GPT_OSS
from tests.train.test_pipeline import SETTINGS, check, one_step, steps_that_differ

FAMILIES = {"mla": SETTINGS, "gqa": GROUPED, "gpt_oss": GPT_OSS}
MASK = "data.document_mask=true"
WIDER = "batch.micro_batch=2"
FEW = ("model.num_layers=2", "model.num_dense_layers=1")
# family, settings of the one process, cp, ep, pp, schedule
CASES = [
    ("mla", (), 2, 1, 1, "1f1b"),
    ("mla", (), 4, 1, 1, "1f1b"),
    ("mla", (), 2, 2, 1, "dualpipev"),
    ("mla", (MASK,), 2, 1, 2, "zb1p"),
    ("mla", (MASK,), 2, 1, 2, "dualpipe"),
    ("gqa", (MASK,), 4, 1, 1, "dualpipev"),
    ("gpt_oss", (), 2, 1, 1, "1f1b"),
    ("gpt_oss", (MASK,), 2, 2, 1, "1f1b"),
]


def few(family: str) -> tuple[str, ...]:
    """Few blocks, one of them dense where the family has any."""
    return ("model.num_layers=2",) if family == "gpt_oss" else (*FEW, *(["model.dense_layers=[]"] * (family == "gqa")))


@pytest.fixture(scope="module")
def alone(corpus: list[str]) -> Any:
    """The step of one process, of a family with settings."""

    @cache
    def answer(family: str, settings: tuple[str, ...]) -> dict[str, Any]:
        made = one_step([*corpus, *FAMILIES[family], *settings, "precision=fp32"], 1)
        assert made["gap"] > 1e-5, f"two experts nearly tie ({made['gap']:.1e}): choose another seed"
        return made

    return answer


@pytest.mark.parametrize("family, settings, cp, ep, pp, schedule", CASES)
def test_fp32_step_is_the_one_process_step(
    corpus: list[str], alone: Any, family: str, settings: tuple[str, ...], cp: int, ep: int, pp: int, schedule: str
) -> None:
    world = cp * ep * pp
    words = [*corpus, *FAMILIES[family], *settings, "precision=fp32", f"parallel.cp={cp}", f"parallel.ep={ep}",
             f"parallel.pp={pp}", f"parallel.schedule={schedule}"]  # fmt: skip
    check(run_ranks(one_step, world, words, world), alone(family, settings), mtp_tied=schedule == "zb1p")


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention takes as few heads at once as it may; ranks are forked from here."""
    monkeypatch.setattr(latent_context, "KEY_BYTES", 1)


def test_fp32_step_in_groups_of_heads_is_the_one_process_step(
    corpus: list[str], alone: Any, small_groups: None
) -> None:
    assert (
        latent_context.heads_at_once(configured([*corpus, *SETTINGS]).model.attention, Recipe(Precision.FP32), 1) == 1
    )
    words = [*corpus, *SETTINGS, MASK, "precision=fp32", "parallel.cp=2", "recompute=[norm,mla_up,swiglu]"]
    check(run_ranks(one_step, 2, words, 2), alone("mla", (MASK,)), mtp_tied=False)


def test_groups_of_heads_change_no_bit_of_an_fp8_forward(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head's products are the same; gradients are sums over groups, rounded, and recomputed as they were."""
    heads = ("model.attention.nope_dim=64", "model.attention.rope_dim=64", "model.attention.v_dim=64")
    words = [*corpus, *SETTINGS, *FEW, *heads, MASK, "precision=fp8", "parallel.cp=2", "batch.sequences=2",
             "seq_len=256", "parallel.schedule=dualpipev"]  # fmt: skip
    at_once = run_ranks(losses_of, 2, words, 2)
    monkeypatch.setattr(latent_context, "KEY_BYTES", 1)
    assert run_ranks(losses_of, 2, words, 2) == at_once
    assert run_ranks(steps_that_differ, 2, words, [["recompute=[norm,mla_up,swiglu]"]], 2) == [[], []]


def autograd_differs(settings: list[str], world: int) -> list[str]:
    """Parameters whose gradients under ordinary autograd are not the schedule's, bit by bit; losses, if they differ."""
    run, other = (built(configured(settings, world_size=world)) for _ in range(2))
    batches, counts = next_batches(run)
    losses = forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    alpha = run.config.model.router.aux_loss_alpha
    weights = loss_weights(counts, mtp_weight=0.3, balance_alpha=alpha)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        made = other.model(batch)
        total_loss(made, weights).backward()
        sums += torch.stack([made.main, made.mtp, made.balance]).detach().double()
    torch.distributed.all_reduce(sums)
    theirs = (sums / torch.tensor([counts.main_tokens, max(counts.mtp_tokens, 1), counts.sequences])).tolist()
    pairs = zip(run.model.named_parameters(), other.model.named_parameters(), strict=True)
    found = [name for (name, p), (_, q) in pairs if not torch.equal(main_grad_of(p), main_grad_of(q))]
    mine = [losses.main, losses.mtp, losses.balance]
    return found + ([] if mine == pytest.approx(theirs, rel=1e-6) else [f"losses {mine} {theirs}"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_phases_are_ordinary_autograd(corpus: list[str], family: str, precision: str) -> None:
    words = [*corpus, *FAMILIES[family], *few(family), MASK, WIDER, f"precision={precision}", "parallel.cp=2",
             "batch.sequences=4", "seq_len=128", "optimizer.sharding=none",
             "recompute=[norm,mla_up,swiglu]"]  # fmt: skip
    assert run_ranks(autograd_differs, 2, words, 2) == [[], []]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_overlap_and_recomputation_change_no_bit(corpus: list[str], family: str, precision: str) -> None:
    words = [*corpus, *FAMILIES[family], *few(family), MASK, f"precision={precision}", "parallel.cp=2",
             "batch.sequences=2", "seq_len=256", "parallel.schedule=dualpipev"]  # fmt: skip
    others = [["recompute=[swiglu]"], ["recompute=[norm,mla_up,swiglu]"]]
    assert run_ranks(steps_that_differ, 2, words, others, 2) == [[], []]


def losses_of(settings: list[str], world: int) -> tuple[float, ...]:
    run = built(configured(settings, world_size=world))
    batches, counts = next_batches(run)
    losses = forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    return losses.main, losses.mtp, losses.balance


@pytest.mark.parametrize("precision, nearness", [("bf16", 2e-3), ("fp8", 5e-3)])
def test_lower_precisions_come_near_the_one_process_step(corpus: list[str], precision: str, nearness: float) -> None:
    words = [*corpus, *SETTINGS, *FEW, MASK, f"precision={precision}", "batch.sequences=2", "seq_len=256"]
    alone = losses_of(words, 1)
    for losses in run_ranks(losses_of, 2, [*words, "parallel.cp=2"], 2):
        assert losses == pytest.approx(alone, rel=nearness)
