"""Routing: the choice against a loop over tokens, values and gradients against FP64 autograd of the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.reference import route as specification
from fp8moe.kernels.route import GROUP_SCORES, SCORES, route, route_backward


def options(**changes: Any) -> dict[str, Any]:
    """All options of `route`: one group, top-2, normalised sigmoids, one sequence, with `changes`."""
    return {
        "topk": 2, "num_groups": 1, "top_groups": 1, "score": "sigmoid", "group_score": "top2_sum", "normalize": True,
        "route_scale": 1.0, "num_sequences": 1, "force_balance": False,
    } | changes  # fmt: skip


def scoring(given: dict[str, Any]) -> dict[str, Any]:
    """Those of them that `route_backward` takes."""
    return {name: given[name] for name in ("score", "normalize", "route_scale")}


def chosen_of(scores: Tensor, bias: Tensor, topk: int, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """The ids that `route` chooses by these scores: softmax_topk chooses by its logits themselves."""
    given = options(
        topk=topk, num_groups=num_groups, top_groups=top_groups, group_score=group_score, score="softmax_topk"
    )
    return route(scores, bias, None, **given)[0]


def by_loop(
    scores: Tensor, bias: Tensor, topk: int, num_groups: int, top_groups: int, group_score: str
) -> list[list[int]]:
    size = scores.shape[1] // num_groups
    chosen = []
    for row in (scores + bias).tolist():
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        counted = 2 if group_score == "top2_sum" else 1
        strength = [float(torch.tensor(sorted(group, reverse=True)[:counted]).sum()) for group in groups]
        kept = set(sorted(range(num_groups), key=lambda g: (-strength[g], g))[:top_groups])
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen.append(sorted(allowed, key=lambda e: (-row[e], e))[:topk])
    return chosen


def plainly(logits: Tensor, ids: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights and balance loss of the ids by their definition, in the dtype of the logits, followed by autograd."""
    scores = logits.sigmoid() if given["score"] == "sigmoid" else logits.softmax(-1)
    if given["score"] == "softmax_topk":
        weights = torch.stack([row[chosen].softmax(0) for row, chosen in zip(logits, ids, strict=True)])
    else:
        weights = scores.gather(1, ids)
        if given["normalize"]:
            weights = weights / weights.sum(1, keepdim=True)
    loss, num_experts = logits.new_zeros(()), logits.shape[1]
    for rows, chosen in zip(scores.chunk(given["num_sequences"]), ids.chunk(given["num_sequences"]), strict=True):
        for e in range(num_experts):
            f = num_experts / (ids.shape[1] * len(rows)) * int((chosen == e).sum())
            loss = loss + f * (rows[:, e] / rows.sum(1)).mean()
    return given["route_scale"] * weights, loss


@pytest.mark.parametrize("group_score", GROUP_SCORES)
@pytest.mark.parametrize("bias", ["zero", "mixed", "negative"])
@pytest.mark.parametrize(
    "num_experts, topk, num_groups, top_groups",
    [(16, 4, 4, 2), (16, 8, 4, 2), (8, 2, 1, 1), (8, 3, 8, 5), (256, 8, 8, 4), (6, 6, 3, 3), (9, 1, 3, 1)],
)
def test_the_choice_equals_a_loop(
    num_experts: int, topk: int, num_groups: int, top_groups: int, bias: str, group_score: str
) -> None:
    scores = torch.sigmoid(torch.randn(200, num_experts))
    bias_E = {"zero": 0.0, "mixed": 0.3, "negative": 1.0}[bias] * torch.randn(num_experts)
    if bias == "negative":
        bias_E = -bias_E.abs() - 1.0  # every biased score below zero: a mask of zeros would win
    ids = chosen_of(scores, bias_E, topk, num_groups, top_groups, group_score)
    assert ids.dtype is torch.int64 and ids.shape == (200, topk)
    assert ids.tolist() == by_loop(scores, bias_E, topk, num_groups, top_groups, group_score)


@pytest.mark.parametrize("group_score", GROUP_SCORES)
def test_ties_go_to_the_lowest_index(group_score: str) -> None:
    scores = torch.randint(0, 3, (500, 16)) * 0.25 - 0.25  # -0.25, 0 and 0.25: many ties, of groups too
    scores[scores == 0] *= torch.where(torch.rand(int((scores == 0).sum())) < 0.5, 1.0, -1.0)  # and both zeros
    bias = torch.full((16,), -0.0)  # keeps the minus zeros
    ids = chosen_of(scores, bias, 5, 4, 2, group_score)
    assert ids.tolist() == by_loop(scores, bias, 5, 4, 2, group_score)
    assert chosen_of(torch.ones(2, 16), bias, 3, 4, 1, group_score).tolist() == [[0, 1, 2]] * 2


def test_a_group_counts_by_its_two_best_or_by_its_best() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    ids = [chosen_of(scores, torch.zeros(9), 1, 3, 1, group_score).tolist() for group_score in GROUP_SCORES]
    assert ids == [[[3]], [[0]]]  # 1.0 beats 0.9 (best alone) and 0.8 (1.2 as a sum of all)


SIZES = [(16, 4, 4, 2, 3), (8, 2, 1, 1, 1), (20, 6, 5, 3, 2), (6, 3, 6, 4, 2), (7, 7, 1, 1, 1)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_experts", "topk", "num_groups", "top_groups", "num_sequences"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(
    num_experts: int, topk: int, num_groups: int, top_groups: int, num_sequences: int, score: str, normalize: bool
) -> None:
    given = options(
        topk=topk, num_groups=num_groups, top_groups=top_groups, num_sequences=num_sequences, score=score,
        normalize=normalize, route_scale=2.5,
    )  # fmt: skip
    logits, bias = 2 * torch.randn(12, num_experts), torch.randn(num_experts)
    counts = torch.arange(num_experts) + 2**24 + 1  # the first number that FP32 does not hold
    before = counts.clone()
    ids, weights, loss, f = route(logits, bias, counts, **given)
    assert torch.equal(counts - before, torch.bincount(ids.flatten(), minlength=num_experts))
    scores = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1), "softmax_topk": logits}[score]
    assert ids.tolist() == by_loop(scores, bias, topk, num_groups, top_groups, "top2_sum")

    exact = logits.double().requires_grad_()
    expected = plainly(exact, ids, given)
    torch.testing.assert_close(weights.double(), expected[0], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(loss.double(), expected[1], rtol=2e-6, atol=0)
    d_weights, d_loss = torch.randn(12, topk), torch.tensor(0.7)
    (want,) = torch.autograd.grad(expected, exact, (d_weights.double(), d_loss.double()))
    got = route_backward(logits, ids, f, d_weights, d_loss, **scoring(given))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_backward_has_the_bits_of_autograd(score: str, normalize: bool) -> None:
    """Of the composition out of PyTorch's operations, in the order in which autograd takes it back."""
    given = options(topk=3, num_groups=4, top_groups=2, num_sequences=2, score=score, normalize=normalize)
    given["route_scale"] = 2.5
    logits = torch.randn(40, 16).requires_grad_()
    ids, weights, loss, f = route(logits.detach(), torch.zeros(16), None, **given)
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    plain = scores.gather(1, ids)
    if normalize:
        plain = plain / (plain.sum(-1, keepdim=True) + 1e-20)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    of_experts = torch.zeros(40, 16).scatter_(1, ids, 1.0).view(2, 20, 16).mean(1) * (16 / 3)
    plain_loss = (of_experts * shares.view(2, 20, 16).mean(1)).sum()
    plain = plain * 2.5
    assert torch.equal(weights, plain) and torch.equal(loss, plain_loss) and torch.equal(f, of_experts)
    d_weights, d_loss = torch.randn(40, 3), torch.tensor(0.3)
    (want,) = torch.autograd.grad((plain, plain_loss), logits, (d_weights, d_loss))
    assert torch.equal(route_backward(logits.detach(), ids, f, d_weights, d_loss, **scoring(given)), want)


@pytest.mark.parametrize("score", SCORES)
def test_forced_balance_goes_round(score: str) -> None:
    logits, counts = torch.randn(8, 8), torch.zeros(8, dtype=torch.int64)
    given = options(topk=3, num_groups=4, top_groups=2, score=score, force_balance=True)
    ids, weights, loss, f = route(logits, torch.randn(8), counts, **given)
    assert ids[:4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    assert counts.tolist() == [3] * 8 and torch.equal(f, torch.ones(1, 8))
    expected = plainly(logits, ids, given)
    torch.testing.assert_close(weights, expected[0])
    torch.testing.assert_close(loss, expected[1])


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[-100.0, 100.0, 0.0, -3e38], [-90.0, -95.0, -99.0, -120.0]])
    for score in SCORES:
        given = options(score=score)
        ids, weights, loss, f = route(logits, torch.zeros(4), None, **given)
        d_logits = route_backward(logits, ids, f, torch.ones(2, 2), torch.ones(()), **scoring(given))
        assert all(t.isfinite().all() for t in (weights, loss, d_logits))


@pytest.mark.parametrize("score", SCORES)
def test_no_tokens(score: str) -> None:
    counts = torch.ones(8, dtype=torch.int64)
    given = options(num_groups=2, score=score, num_sequences=3)
    ids, weights, loss, f = route(torch.empty(0, 8), torch.zeros(8), counts, **given)
    assert ids.shape == weights.shape == (0, 2) and loss == 0 and torch.equal(f, torch.zeros(3, 8))
    assert counts.tolist() == [1] * 8
    d_logits = route_backward(torch.empty(0, 8), ids, f, weights, loss, **scoring(given))
    assert d_logits.shape == (0, 8) and d_logits.dtype is torch.float32


LOGITS, BIAS = torch.rand(6, 8), torch.zeros(8)


@pytest.mark.parametrize(("arguments", "changes", "message"), [
    ((LOGITS, torch.zeros(7), None), {}, r"logits must be \[T, E\] .* got \[6, 8\] and \[7\]"),
    ((LOGITS.bfloat16(), BIAS, None), {}, "logits and bias must be FP32, got torch.bfloat16"),
    ((LOGITS, BIAS, torch.zeros(8)), {}, r"counts must be int64 \[8\], got torch.float32 \[8\]"),
    ((LOGITS, BIAS, torch.zeros(7, dtype=torch.int64)), {}, r"counts must be int64 \[8\], got torch.int64 \[7\]"),
    ((LOGITS, BIAS, None), {"num_groups": 3}, "num_groups=3 does not divide num_experts=8: use 2"),
    ((LOGITS, BIAS, None), {"top_groups": 3, "num_groups": 2}, "top_groups=3 must be between 1 and num_groups=2"),
    ((LOGITS, BIAS, None), {"topk": 5, "num_groups": 2}, "between 1 and the 4 experts of top_groups: use 4"),
    ((LOGITS, BIAS, None), {"topk": 0}, "topk=0"),
    ((LOGITS, BIAS, None), {"score": "tanh"}, "score='tanh' does not exist: use sigmoid or softmax or softmax_topk"),
    ((LOGITS, BIAS, None), {"group_score": "sum"}, "group_score='sum' does not exist: use top2_sum or max"),
    ((LOGITS, BIAS, None), {"num_sequences": 4}, "num_sequences=4 does not divide the 6 tokens: use 3"),
    ((LOGITS, BIAS, None), {"num_sequences": 0}, "num_sequences=0 does not divide the 6 tokens: use 1"),
])  # fmt: skip
def test_wrong_arguments(arguments: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(*arguments, **options(**changes))


@pytest.mark.parametrize(("at", "wrong", "message"), [
    (0, torch.rand(6), r"takes logits \[T, E\], ids and d_weights \[T, K\] and d_loss \[\], got \[6\]"),
    (1, torch.zeros(5, 2, dtype=torch.int64), r"\[5, 2\]"),
    (3, torch.zeros(6, 3), r"\[6, 3\]"),
    (4, torch.zeros(1), r"and \[1\]: pass what route gave"),
    (2, torch.zeros(1, 7), r"f must be \[B, 8\] with B a divisor of the 6 tokens, got \[1, 7\]"),
    (2, torch.zeros(4, 8), r"got \[4, 8\]"),
    (2, torch.zeros(8), r"got \[8\]"),
    (3, torch.zeros(6, 2, dtype=torch.float64), "must be FP32 and ids int64, got .* torch.float64"),
    (1, torch.zeros(6, 2, dtype=torch.int32), "torch.int32: cast them"),
])  # fmt: skip
def test_wrong_arguments_of_the_backward(at: int, wrong: Tensor, message: str) -> None:
    right = [LOGITS, torch.zeros(6, 2, dtype=torch.int64), torch.zeros(1, 8), torch.zeros(6, 2), torch.zeros(())]
    with pytest.raises(ValueError, match=message):
        route_backward(*right[:at], wrong, *right[at + 1 :], **scoring(options()))
    with pytest.raises(ValueError, match="score='tanh' does not exist"):
        route_backward(*right, **scoring(options(score="tanh")))


def test_the_specification_takes_the_keys_of_every_number() -> None:
    row = torch.tensor([[-0.0, 0.0, float("-inf"), -1e-42, 1e-42, -3e38, float("inf"), 1.0]])
    assert specification._first_indices(row, 8).tolist() == [[6, 7, 4, 0, 1, 3, 5, 2]]
