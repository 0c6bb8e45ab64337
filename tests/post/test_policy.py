"""The objective of GRPO: advantages by hand, and one step beside FP64 autograd of the published formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.layers.linear import main_grad_of
from fp8moe.model.loss import LossCounts
from fp8moe.post.logprobs import label_logprobs
from fp8moe.post.policy import PolicyLoss, PolicyTokens, group_advantages, mismatch, token_shares
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.run import Run
from fp8moe.train.step import forward_backward
from tests.train.runs import built, configured

NAN = float("nan")
SETTINGS = ("precision=fp32", "model.router.aux_loss_alpha=0", "model.mtp_depth=0", "seed=5")
SAMPLES, GROUP, PROMPT = 8, 4, 12  # every row is a sample whose first tokens are its prompt


def test_advantages_are_normalised_within_the_group() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2, 3, NAN, 0, 0, NAN, NAN, NAN, NAN], dtype=torch.float64)
    found = group_advantages(rewards, 4, normalize_std=True)
    assert found.of_samples[:4].tolist() == [1, -1, -1, 1]
    assert found.of_samples[4:8].tolist() == [0] * 4 and found.alike == 1
    torch.testing.assert_close(found.of_samples[[8, 10, 11]], torch.tensor([2.0, -1, -1]).double() / 2**0.5)
    assert found.of_samples[9] == 0 and not bool(found.of_samples[12:].any())
    assert found.is_scored.tolist() == [True] * 9 + [False] + [True] * 2 + [False] * 4
    assert found.is_trained.tolist() == [True] * 4 + [False] * 4 + [True, False, True, True] + [False] * 4
    plain = group_advantages(rewards, 4, normalize_std=False).of_samples
    assert plain[:4].tolist() == [0.5, -0.5, -0.5, 0.5] and plain[8:12].tolist() == [2, 0, -1, -1]


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_shares_make_the_mean_that_is_asked_for(average: Any) -> None:
    lengths, scored = torch.tensor([4, 1, 5, 3]), torch.tensor([True, True, True, False])
    values = [torch.arange(length).double() + 1 for length in lengths.tolist()]
    shares = token_shares(lengths, scored, GrpoConfig(average=average, max_tokens=10))
    found = sum(float(share * one.sum()) for share, one in zip(shares, values, strict=True))
    kept = values[:3]
    expected = {
        "sequence": sum(float(one.mean()) for one in kept) / 3,
        "token": float(torch.cat(kept).mean()),
        "constant": sum(float(one.sum()) / 10 for one in kept) / 3,
    }
    assert found == pytest.approx(expected[average])


def published(
    logits_NSV: Tensor, labels_NS: Tensor, config: GrpoConfig, rewards_N: Tensor, old: Tensor, ref: Tensor, roll: Tensor
) -> Tensor:
    """-J of the published formula on whole logits, sample by sample."""
    logp = (logits_NSV / config.temperature).log_softmax(-1)
    groups = rewards_N.view(-1, GROUP)
    advantages = groups - groups.mean(1, keepdim=True)
    if config.normalize_std:
        advantages = advantages / groups.std(1, keepdim=True, correction=0)
    total, tokens = torch.zeros((), dtype=torch.float64), int((labels_NS >= 0).sum())
    for n, advantage in enumerate(advantages.flatten()):
        at = labels_NS[n] >= 0
        of_token = logp[n, at].gather(1, labels_NS[n, at][:, None])[:, 0]
        ratio = (of_token - old[n, at]).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
        if config.importance_cap is not None:
            surrogate = surrogate * (old[n, at] - roll[n, at]).exp().clamp(max=config.importance_cap)
        log_ratio = ref[n, at] - of_token
        value = surrogate - config.kl * (log_ratio.exp() - log_ratio - 1)
        weight = {"sequence": 1 / (SAMPLES * int(at.sum())), "token": 1 / tokens, "constant": 1 / (SAMPLES * 64)}
        total = total - weight[config.average] * value.sum()
    return total


def microbatches(run: Run, lengths: list[int]) -> list[Any]:
    """Samples of these lengths in micro-batches of two; labels of prompts and behind the end are not predicted."""
    batches = []
    for first in range(0, SAMPLES, 2):
        batch = run.data.train.batch([first, first + 1])
        labels = batch.labels_BS.clone()
        for row in range(2):
            labels[row, : PROMPT - 1] = labels[row, PROMPT - 1 + lengths[first + row] :] = -100
        batches.append(dataclasses.replace(batch, labels_BS=labels))
    return batches


def whole_logits(run: Run, batches: list[Any]) -> Tensor:
    """FP32 [N, S, V] under ordinary autograd."""
    model, rows = run.model, []
    for batch in batches:
        positions = model.positions(batch.positions_BS, batch.document_lengths)
        hidden, _ = model.run_blocks(model.embedding(batch.inputs_BS.flatten()), positions)
        rows.append(model.head(model.norm(hidden)).unflatten(0, batch.inputs_BS.shape))
    return torch.cat(rows)


CONFIGS = {
    "GRPO": GrpoConfig(kl=0.05),
    "no KL, no correction": GrpoConfig(kl=0.0, importance_cap=None),
    "Dr. GRPO": GrpoConfig(kl=0.05, normalize_std=False, average="constant", max_tokens=64),
    "DAPO": GrpoConfig(kl=0.02, average="token", clip_high=0.28, importance_cap=1.05),
    "temperature": GrpoConfig(kl=0.05, temperature=0.7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_fp64_autograd_of_the_published_formula(name: str, corpus: list[str]) -> None:
    config = CONFIGS[name]
    run = built(configured(corpus, *SETTINGS))
    lengths = [17, 3, 9, 20, 1, 12, 7, 15]
    batches = microbatches(run, lengths)
    labels = torch.cat([batch.labels_BS for batch in batches])
    now = label_logprobs(run, batches, config.temperature).view(labels.shape).double()
    generator = torch.Generator().manual_seed(2)
    old, ref, roll = ((now + scale * torch.randn(now.shape, generator=generator)).float() for scale in (0.3, 0.5, 0.4))
    rewards = torch.tensor([1.0, 0, 0, 2, 0, 0, 1, 1], dtype=torch.float64)

    logits = whole_logits(run, batches)  # its graph is FP32; from the logits on everything is FP64
    wide = logits.detach().double().requires_grad_()
    exact = published(wide, labels, config, rewards, old.double(), ref.double(), roll.double())
    exact.backward()
    run.model.main_grads.zero_()
    logits.backward(wide.grad.float())
    expected = {name: main_grad_of(p).clone() for name, p in run.model.named_parameters()}

    tokens, at = int((labels >= 0).sum()), labels >= 0
    advantages = group_advantages(rewards, GROUP, normalize_std=config.normalize_std)
    shares = token_shares(torch.tensor(lengths), advantages.is_scored, config)
    spread = (len(batches), -1)
    policy = PolicyTokens(
        *((one[:, None] * at).float().view(spread) for one in (advantages.of_samples, shares)),
        old.view(spread),
        roll.view(spread),
        ref.view(spread) if config.kl else None,
    )
    run.model.main_grads.zero_()
    loss = PolicyLoss(policy, config, tokens)
    losses = forward_backward(run, batches, LossCounts(tokens, 1, SAMPLES), 0.0, Stopwatch(run.device), loss)
    assert losses.main == pytest.approx(exact.item(), rel=2e-5, abs=1e-7)
    largest = max(float(grad.norm()) for grad in expected.values())
    for parameter_name, parameter in run.model.named_parameters():
        apart = float((main_grad_of(parameter) - expected[parameter_name]).norm())
        assert apart < 2e-5 * max(float(expected[parameter_name].norm()), 1e-2 * largest), parameter_name
    assert largest > 1e-3 and 0.05 < loss.figures(run.mesh).clip_share < 0.9
    run.reader.close()


def test_a_policy_compared_with_itself_has_ratio_1_and_no_kl(corpus: list[str]) -> None:
    run = built(configured(corpus, *SETTINGS))
    batches = microbatches(run, [17, 3, 9, 20, 1, 12, 7, 15])
    labels = torch.stack([batch.labels_BS.flatten() for batch in batches])
    now = label_logprobs(run, batches)
    at = (labels >= 0).float()
    policy = PolicyTokens(at, at / at.sum(), now, now, now)
    loss = PolicyLoss(policy, GrpoConfig(), float(at.sum()))
    losses = forward_backward(run, batches, LossCounts(int(at.sum()), 1, SAMPLES), 0.0, Stopwatch(run.device), loss)
    figures = loss.figures(run.mesh)
    assert figures.clip_share == 0 and figures.kl is not None
    assert figures.ratio_deviation < 1e-6 and abs(figures.kl) < 1e-7 and abs(figures.old_kl) < 1e-7
    assert losses.main == pytest.approx(-1.0, abs=1e-6)
    run.reader.close()


def test_the_mismatch_is_measured() -> None:
    old, rollout = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -3.0, -2.5])
    found = mismatch(old, rollout, 2.0)
    assert found.largest == 1.0 and found.capped == pytest.approx(1 / 3)
    apart = (old - rollout).double()
    assert found.kl == pytest.approx(float((apart.exp() - apart - 1).mean()))
    assert mismatch(old[:0], rollout[:0], 2.0).kl == 0
