"""Group-limited top-k against a loop over tokens that sorts Python numbers."""

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.topk import group_limited_topk


def by_loop(scores: Tensor, bias: Tensor, topk: int, num_groups: int, top_groups: int) -> list[list[int]]:
    size = scores.shape[1] // num_groups
    chosen = []
    for row in (scores + bias).tolist():
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        strength = [float(torch.tensor(sorted(group, reverse=True)[:2]).sum()) for group in groups]
        kept = set(sorted(range(num_groups), key=lambda g: (-strength[g], g))[:top_groups])
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen.append(sorted(allowed, key=lambda e: (-row[e], e))[:topk])
    return chosen


@pytest.mark.parametrize("bias", ["zero", "mixed", "negative"])
@pytest.mark.parametrize(
    "num_experts, topk, num_groups, top_groups",
    [(16, 4, 4, 2), (16, 8, 4, 2), (8, 2, 1, 1), (8, 3, 8, 5), (256, 8, 8, 4), (6, 6, 3, 3), (9, 1, 3, 1)],
)
def test_equals_a_loop(num_experts: int, topk: int, num_groups: int, top_groups: int, bias: str) -> None:
    scores = torch.sigmoid(torch.randn(200, num_experts))
    bias_E = {"zero": 0.0, "mixed": 0.3, "negative": 1.0}[bias] * torch.randn(num_experts)
    if bias == "negative":
        bias_E = -bias_E.abs() - 1.0  # every biased score below zero: a mask of zeros would win
    ids = group_limited_topk(scores, bias_E, topk=topk, num_groups=num_groups, top_groups=top_groups)
    assert ids.dtype is torch.int64 and ids.shape == (200, topk)
    assert ids.tolist() == by_loop(scores, bias_E, topk, num_groups, top_groups)


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.randint(0, 3, (500, 16)) * 0.25 - 0.25  # -0.25, 0 and 0.25: many ties, of groups too
    scores[scores == 0] *= torch.where(torch.rand(int((scores == 0).sum())) < 0.5, 1.0, -1.0)  # and both zeros
    bias = torch.full((16,), -0.0)  # keeps the minus zeros
    ids = group_limited_topk(scores, bias, topk=5, num_groups=4, top_groups=2)
    assert ids.tolist() == by_loop(scores, bias, 5, 4, 2)
    equal = group_limited_topk(torch.ones(2, 16), bias, topk=3, num_groups=4, top_groups=1)
    assert equal.tolist() == [[0, 1, 2]] * 2


def test_a_group_counts_by_its_two_best() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    ids = group_limited_topk(scores, torch.zeros(9), topk=1, num_groups=3, top_groups=1)
    assert ids.tolist() == [[3]]  # 1.0 beats 0.9 (best alone) and 0.8 (1.2 as a sum of all)


def test_no_tokens() -> None:
    assert group_limited_topk(torch.empty(0, 8), torch.zeros(8), topk=2, num_groups=2, top_groups=1).shape == (0, 2)


def test_wrong_arguments() -> None:
    def call(scores: Tensor, bias: Tensor, topk: int, num_groups: int, top_groups: int) -> Tensor:
        return group_limited_topk(scores, bias, topk=topk, num_groups=num_groups, top_groups=top_groups)

    scores, bias = torch.rand(3, 8), torch.zeros(8)
    cases = (
        ((scores, torch.zeros(7), 2, 2, 1), r"\[3, 8\] and \[7\]"),
        ((scores.bfloat16(), bias, 2, 2, 1), "scores and bias must be FP32, got torch.bfloat16"),
        ((scores, bias, 2, 3, 1), "num_groups=3 does not divide num_experts=8: use 2"),
        ((scores, bias, 2, 2, 3), "top_groups=3 must be between 1 and num_groups=2: use 2"),
        ((scores, bias, 5, 2, 1), "topk=5 must be between 1 and the 4 experts of top_groups: use 4"),
        ((scores, bias, 0, 2, 1), "topk=0"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            call(*arguments)
