"""Routing on the machine: ids, loads and f to the bit, weights, loss and gradients within a few last places.

A case is named as its kernels are in the compile table. Where the score is the logit itself many logits are equal, of
both zeros too, so that ties of experts and of groups decide; elsewhere the exponential of a GPU may end another way in
the last place, and scores are kept apart. Lengths of sequences leave the last program of each with rows to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import assert_equal, ops

Case = tuple[str, Callable[[Machine], None]]
SEQUENCES, LENGTH = 2, 11
# Score, experts, top-k, groups, groups of a token, their score: those of the compile table.
SIZES = (
    ("sigmoid", 256, 8, 8, 4, "top2_sum"),
    ("softmax", 160, 6, 8, 3, "max"),
    ("softmax_topk", 128, 4, 1, 1, "top2_sum"),
    ("sigmoid", 512, 16, 1, 1, "top2_sum"),
)


def apart(tokens: int, num_experts: int) -> Tensor:
    """Logits whose scores differ by far more than rounding within a token."""
    ranks = torch.rand(tokens, num_experts).argsort(1).float()
    return (ranks + 0.5 * torch.rand(tokens, 1)) * (6 / num_experts) - 3


def tied(tokens: int, num_experts: int) -> Tensor:
    """Logits of few different values, zeros of both signs among them."""
    logits = torch.randint(-2, 3, (tokens, num_experts)) * 0.25
    return torch.where(logits == 0, torch.where(torch.rand_like(logits) < 0.5, 0.0, -0.0), logits)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def route(machine: Machine, score: str, sizes: tuple[int, int, int, int, str]) -> None:
    num_experts, topk, num_groups, top_groups, group_score = sizes
    logits = (tied if score == "softmax_topk" else apart)(SEQUENCES * LENGTH, num_experts)
    bias, counts = torch.full((num_experts,), -0.0), torch.randint(0, 9, (num_experts,))
    keywords = {
        "topk": topk, "num_groups": num_groups, "top_groups": top_groups, "group_score": group_score, "score": score,
        "normalize": score != "softmax", "route_scale": 2.5, "num_sequences": SEQUENCES, "force_balance": False,
    }  # fmt: skip
    ours, theirs = counts.clone(), counts.clone()
    with on_machine(machine):
        got = ops("triton", "route").route(logits, bias, ours, **keywords)
    ids, weights, loss, f = ops("reference", "route").route(logits, bias, theirs, **keywords)
    assert_equal((got[0], ours, got[3]), (ids, theirs, f))
    close(got[1], weights)
    close(got[2], loss)


def backward(machine: Machine, score: str, num_experts: int, topk: int) -> None:
    logits = torch.randn(SEQUENCES * LENGTH, num_experts)
    ids = torch.rand_like(logits).topk(topk, dim=1).indices
    f, d_weights, d_loss = torch.rand(SEQUENCES, num_experts), torch.randn(len(logits), topk), torch.tensor(3.0)
    arguments = logits, ids, f, d_weights, d_loss
    keywords = {"score": score, "normalize": score != "softmax", "route_scale": 2.5}
    with on_machine(machine):
        got = ops("triton", "route").route_backward(*arguments, **keywords)
    close(got, ops("reference", "route").route_backward(*arguments, **keywords))


def cases() -> Iterator[Case]:
    """Forward and backward by every score."""
    for score, *sizes in SIZES:
        label = f"{score} top-{sizes[1]} of {sizes[0]}"
        yield f"triton route {label}", partial(route, score=score, sizes=tuple(sizes))
        yield f"triton route_backward {label}", partial(backward, score=score, num_experts=sizes[0], topk=sizes[1])
