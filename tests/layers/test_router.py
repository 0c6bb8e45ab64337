"""Routing, its counts, the bias that steers them and the faint loss, against loops."""

from __future__ import annotations

import pytest
import torch

from fp8moe.layers.recipe import Precision
from fp8moe.layers.router import Router, RouterConfig, max_violation, sequence_loss, update_bias

SIGMOID = RouterConfig(
    num_experts=8, topk=2, num_groups=4, top_groups=2, score="sigmoid", normalize_topk=True, route_scale=2.5,
    force_balance=False,
)  # fmt: skip
SOFTMAX = RouterConfig(
    num_experts=8, topk=3, num_groups=1, top_groups=1, score="softmax", normalize_topk=False, route_scale=1.0,
    force_balance=False,
)  # fmt: skip


def build(config: RouterConfig) -> Router:
    torch.manual_seed(0)
    router = Router(32, config, precision=Precision.FP32)
    torch.nn.init.normal_(router.weight, std=0.3)
    return router


@pytest.mark.parametrize("config", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
def test_weights_come_from_unbiased_scores(config: RouterConfig) -> None:
    router = build(config)
    router.bias_E.uniform_(-2.0, -1.0)
    x = torch.randn(10, 32)
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
    router, x = build(SIGMOID), torch.randn(10, 32)
    router.eval()
    router(x, 1)
    with torch.no_grad():
        router.train()
        router(x, 1)
    assert router.counts_E.sum() == 0
    routing = router(x, 1)
    assert torch.equal(router.counts_E, torch.bincount(routing.topk_ids_TK.flatten(), minlength=8))


def test_bias_moves_towards_balance_and_counts_start_anew() -> None:
    router = build(SIGMOID)
    router.counts_E.copy_(torch.tensor([5, 3, 4, 4, 4, 4, 4, 4]))
    update_bias(router, gamma=0.5)
    assert router.bias_E.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert not router.counts_E.any()


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
