"""Routing, its counts, the bias that balances loads and the sequence-wise loss, against loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.live_memory import TrackStorages
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig, max_violation, sequence_loss, update_bias

EXPERTS, DIM = 8, 32
SIGMOID = RouterConfig(topk=2, num_groups=4, top_groups=2, route_scale=2.5)
SOFTMAX = RouterConfig(topk=3, score="softmax", normalize_topk=False)


def build(config: RouterConfig, precision: Precision = Precision.FP32, dim: int = DIM) -> Router:
    torch.manual_seed(0)
    router = Router(dim, EXPERTS, config, Recipe(precision))
    torch.nn.init.normal_(router.weight, std=0.3)
    return router


@pytest.mark.parametrize("config", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
def test_weights_come_from_unbiased_scores(config: RouterConfig) -> None:
    router = build(config)
    router.bias_E.uniform_(-2.0, -1.0)
    x = torch.randn(10, DIM)
    routing = router(x, num_sequences=2)
    logits = x @ router.weight.T
    scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
    for t in range(10):
        chosen = scores[t, routing.topk_ids_TK[t]]
        expected = chosen / chosen.sum() * 2.5 if config.normalize_topk else chosen
        torch.testing.assert_close(routing.topk_weights_TK[t], expected)
        groups = set((routing.topk_ids_TK[t] // (8 // config.num_groups)).tolist())
        assert len(groups) <= config.top_groups


def test_counts_grow_in_training_forwards_only() -> None:
    router, x = build(SIGMOID), torch.randn(10, DIM)
    router.eval()
    router(x, 1)
    with torch.no_grad():
        router.train()
        router(x, 1)
    assert router.counts_E.sum() == 0
    first, second = router(x, 1), router(-x, 1)
    chosen = torch.cat([first.topk_ids_TK, second.topk_ids_TK])
    assert torch.equal(router.counts_E, torch.bincount(chosen.flatten(), minlength=EXPERTS))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_the_router_keeps_no_wide_copies_and_has_the_gradients_of_a_plain_product(precision: Precision) -> None:
    tokens, dim = 48, 64
    router = build(SIGMOID, precision, dim)
    x = torch.randn(tokens, dim).to(precision.dtype).requires_grad_()
    with TrackStorages() as tracked:
        routing = router(x, 2)
    assert tracked.live_bytes() < tokens * dim * 2
    dy = torch.randn(tokens, 2)
    got = torch.autograd.grad(routing.topk_weights_TK, (x, router.weight), dy)

    scores = torch.nn.functional.linear(x.float(), router.weight.float()).sigmoid().gather(1, routing.topk_ids_TK)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) * 2.5
    expected = torch.autograd.grad(weights, (x, router.weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("loads, moves", [
    ([5, 3, 4, 4, 4, 4, 4, 4], [-0.5, 0.5, 0, 0, 0, 0, 0, 0]),
    # The mean is 4, the median 1: experts with 2 and 3 are above the one and below the other.
    ([22, 1, 1, 1, 1, 1, 2, 3], [-0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    # The mean is 6, the median 8: those with 7 are above the mean and below the median.
    ([8, 8, 8, 8, 7, 7, 1, 1], [-0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5]),
])  # fmt: skip
def test_bias_moves_towards_the_mean_load_and_counts_start_anew(loads: list[int], moves: list[float]) -> None:
    router = build(SIGMOID)
    router.bias_E.fill_(1.0)
    router.counts_E.copy_(torch.tensor(loads))
    update_bias(router, gamma=0.5)
    assert (router.bias_E - 1.0).tolist() == moves
    assert not router.counts_E.any()


def test_choice_is_by_biased_scores_and_forced_balance_goes_round() -> None:
    router = build(replace(SIGMOID, num_groups=1, top_groups=1))
    router.bias_E[3] = 5.0
    scores = torch.rand(16, EXPERTS)
    ids = router.choose(scores)
    others = scores.clone()
    others[:, 3] = -1.0
    assert (ids.sort(-1).values == torch.stack([torch.full((16,), 3), others.argmax(-1)], -1).sort(-1).values).all()
    forced = build(replace(SIGMOID, topk=3, force_balance=True))
    assert forced.choose(scores[:4]).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]


@pytest.mark.parametrize("change, words", [
    *(({name: 0}, rf"^model\.router\.{name}=0 must be at least 1$") for name in ("topk", "num_groups", "top_groups")),
    ({"score": "tanh"}, r"model\.router\.score='tanh' is not a score function: use sigmoid or softmax"),
    ({"top_groups": 5}, r"model\.router\.top_groups=5 exceeds num_groups=4: use at most 4"),
])  # fmt: skip
def test_impossible_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SIGMOID, **change)


@pytest.mark.parametrize("change, experts, words", [
    ({}, 10, r"model\.router\.num_groups=4 does not divide num_experts=10: use 2"),
    ({"num_groups": 3}, 8, r"model\.router\.num_groups=3 does not divide num_experts=8: use 2"),
    ({"topk": 5}, 8, r"model\.router\.topk=5 exceeds the 4 experts of top_groups=2 groups: use at most 4"),
])  # fmt: skip
def test_a_number_of_experts_that_does_not_fit_is_refused(change: dict[str, Any], experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SIGMOID, **change).check(experts)
    replace(SIGMOID, topk=4).check(8)


def test_a_batch_without_tokens_has_no_loss() -> None:
    routing = build(SIGMOID)(torch.zeros(0, DIM, requires_grad=True), 1)
    assert routing.balance_loss == 0 and routing.topk_ids_TK.shape == (0, 2)
    routing.balance_loss.backward()


def test_sequence_loss_is_the_papers_sum() -> None:
    torch.manual_seed(1)
    scores = torch.rand(12, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(12, 4).topk(2).indices
    expected = torch.zeros((), dtype=torch.float64)
    for sequence in range(3):
        rows = range(4 * sequence, 4 * sequence + 4)
        for e in range(4):
            f = 4 / (2 * 4) * sum(int(e in ids[t].tolist()) for t in rows)
            p = sum(scores[t, e] / scores[t].sum() for t in rows) / 4
            expected = expected + f * p
    loss = sequence_loss(scores, ids, num_sequences=3)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, scores)
    (want,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(grad, want)


def test_max_violation() -> None:
    assert max_violation(torch.tensor([2, 2, 2])) == 0
    assert max_violation(torch.tensor([6, 0, 0])) == 2
    assert max_violation(torch.zeros(3)) == 0


def test_loads_are_counted_exactly_however_many() -> None:
    router = build(SIGMOID)
    router.counts_E += 2**24 + 1  # the first number that FP32 does not hold
    routing = router(torch.randn(10, DIM), num_sequences=1)
    loads = routing.topk_ids_TK.flatten().tolist()
    assert router.counts_E.tolist() == [2**24 + 1 + loads.count(expert) for expert in range(EXPERTS)]
