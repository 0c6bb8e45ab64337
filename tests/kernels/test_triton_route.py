"""Routing in Triton: ids and loads to the bit, weights, loss and gradients within a few last places."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.reference import route as twin
from fp8moe.kernels.route import GROUP_SCORES, SCORES, route, route_backward
from fp8moe.kernels.triton import route as ops
from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig, gate_logits
from tests.kernels.row_maps import record_waits
from tests.kernels.test_route import options, plainly, scoring

# Experts, top-k, groups, groups of a token, sequences, tokens of each.
SIZES = [
    *((8, 2, 4, 2, 3, 16), (160, 6, 8, 3, 1, 5), (9, 1, 3, 1, 2, 3), (12, 3, 1, 1, 1, 11), (20, 16, 20, 18, 1, 9)),
    *((7, 3, 7, 7, 1, 1), (1, 1, 1, 1, 1, 2), (256, 8, 8, 4, 1, 3)),
]


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-7) -> None:
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=atol)


def check(logits: Tensor, bias: Tensor, **changes: Any) -> None:
    """Forward and backward beside the reference; counts start from what is in them."""
    given = options(**changes)
    ours = torch.arange(len(bias), device=bias.device) + 2**24 + 1  # the first number that FP32 does not hold
    theirs = ours.clone()
    ids, weights, loss, f = route(logits, bias, ours, **given)
    expected = twin.route(logits, bias, theirs, **given)
    assert ids.dtype is torch.int64 and torch.equal(ids, expected[0])
    assert torch.equal(ours, theirs)
    close(f, expected[3])  # PyTorch divides by a number on a CPU and multiplies by its inverse on a GPU
    close(weights, expected[1])
    close(loss, expected[2])
    d_weights, d_loss = torch.randn_like(weights), torch.tensor(0.7, device=bias.device)
    d_logits = route_backward(logits, ids, f, d_weights, d_loss, **scoring(given))
    close(d_logits, twin.route_backward(logits, ids, f, d_weights, d_loss, **scoring(given)), atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_experts", "topk", "num_groups", "top_groups", "num_sequences", "length"), SIZES)
def test_it_is_the_reference_at_every_size(
    triton_device, num_experts, topk, num_groups, top_groups, num_sequences, length, score
):
    logits = 2 * torch.randn(num_sequences * length, num_experts, device=triton_device)
    bias = 0.1 * torch.randn(num_experts, device=triton_device)
    sizes = {"topk": topk, "num_groups": num_groups, "top_groups": top_groups, "num_sequences": num_sequences}
    for group_score in GROUP_SCORES:
        check(logits, bias, score=score, group_score=group_score, route_scale=2.5, **sizes)


@pytest.mark.parametrize(("score", "forced"), [("sigmoid", False), ("softmax", True), ("softmax_topk", False)])
def test_it_is_the_reference_with_512_experts(triton_device, score, forced):
    logits, bias = (torch.randn(*shape, device=triton_device) for shape in ((2, 512), (512,)))
    bias = -bias.abs() - 1  # every biased score below zero: a mask of zeros would win
    sizes = {"topk": 16, "num_groups": 16, "top_groups": 5, "num_sequences": 2}
    check(logits, bias, score=score, normalize=score != "softmax", force_balance=forced, **sizes)


@pytest.mark.parametrize("score", SCORES)
def test_forced_balance_and_weights_that_are_not_normalised(triton_device, score):
    logits, bias = (torch.randn(*shape, device=triton_device) for shape in ((21, 12), (12,)))
    sizes = {"topk": 5, "num_groups": 3, "top_groups": 2, "num_sequences": 3, "score": score, "route_scale": 0.5}
    check(logits, bias, **sizes, normalize=False)
    check(logits, bias, **sizes, normalize=False, force_balance=True)
    check(logits, bias, **sizes, force_balance=True)


@pytest.mark.parametrize("group_score", GROUP_SCORES)
def test_ties_go_to_the_lowest_index(triton_device, group_score):
    """Chosen by the logits themselves: the same scores on both sides, three different ones, zeros of both signs."""
    logits = torch.randint(0, 3, (100, 16)) * 0.25 - 0.25
    logits = torch.where(logits == 0, torch.where(torch.rand(100, 16) < 0.5, 0.0, -0.0), logits).to(triton_device)
    bias = torch.full((16,), -0.0, device=triton_device)  # keeps the minus zeros
    check(logits, bias, score="softmax_topk", topk=5, num_groups=4, top_groups=2, group_score=group_score)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about them
def test_numbers_that_are_none_make_no_id_that_no_expert_has(triton_device):
    logits = torch.full((4, 12), float("nan"), device=triton_device)
    logits[1] = float("-inf")
    logits[2, 3:] = float("inf")
    for score in SCORES:
        given = options(topk=5, num_groups=3, top_groups=2, score=score)
        ids, *_ = route(logits, torch.zeros(12, device=triton_device), None, **given)
        assert ((ids >= 0) & (ids < 12)).all() and all(len(set(row)) == 5 for row in ids.tolist())


def test_operands_of_any_stride(triton_device):
    wide = torch.randn(9, 40, device=triton_device)
    bias = torch.randn(40, device=triton_device)[::2]
    for logits in (wide[:, 10:30], wide.t().contiguous().t()[:, :20], wide[:, ::2]):
        check(logits, bias, topk=3, num_groups=4, top_groups=2, num_sequences=3)
    given = options(topk=3, score="softmax")
    logits = wide[:, :20]
    ids, _, loss, f = route(logits, bias, None, **given)
    spread = torch.randn(3, 9, device=triton_device).t(), loss.expand(3)[0]
    across = ids.t().contiguous().t()
    expected = twin.route_backward(logits, ids, f, *spread, **scoring(given))
    close(route_backward(logits, across, f, *spread, **scoring(given)), expected, atol=1e-6)


def test_more_programs_of_a_sequence_than_are_summed_at_once(triton_device, monkeypatch):
    monkeypatch.setattr(ops, "BALANCE_PARTS", 2)
    check(torch.randn(2 * 90, 8, device=triton_device), torch.zeros(8, device=triton_device), num_sequences=2)


def test_no_tokens_launch_nothing(triton_device):
    counts = torch.ones(8, dtype=torch.int64, device=triton_device)
    logits, bias = torch.empty(0, 8, device=triton_device), torch.zeros(8, device=triton_device)
    given = options(num_sequences=3)
    ids, weights, loss, f = route(logits, bias, counts, **given)
    assert ids.shape == weights.shape == (0, 2) and loss == 0 and torch.equal(f, torch.zeros_like(f))
    assert route_backward(logits, ids, f, weights, loss, **scoring(given)).shape == (0, 8)
    assert counts.tolist() == [1] * 8


def test_nothing_waits_for_the_device(triton_device):
    logits, bias = torch.randn(6, 8, device=triton_device), torch.zeros(8, device=triton_device)
    counts = torch.zeros(8, dtype=torch.int64, device=triton_device)
    given = options(num_sequences=2)
    with record_waits() as waits:
        ids, weights, loss, f = route(logits, bias, counts, **given)
        route_backward(logits, ids, f, weights, loss, **scoring(given))
    assert waits == []


@pytest.mark.gpu
def test_the_routers_products_run_on_tensor_cores_and_keep_fp32(triton_device):
    """The whole router at a production size: nothing waits, and the weight's gradient is FP64's to 1e-5."""
    dim, num_experts, given = 2048, 256, options(topk=8, num_groups=8, top_groups=4, num_sequences=2)
    config = RouterConfig(topk=8, num_groups=8, top_groups=4)
    with torch.device(triton_device):
        router = Router(dim, num_experts, config, Recipe(Precision.BF16))
        attach_main_grads(router)
        torch.nn.init.normal_(router.weight, std=0.03)
        x = torch.randn(4096, dim).bfloat16().requires_grad_()
        d_weights, d_loss = torch.randn(4096, 8), torch.tensor(0.5)
    for debug in ("default", "error"):  # compiled first
        router.weight.main_grad.zero_()
        router.counts_E.zero_()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(debug)
        try:
            routing = router(x, 2)
            torch.autograd.backward((routing.topk_weights_TK, routing.balance_loss), (d_weights, d_loss))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(router.counts_E.sum()) == 4096 * 8
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, router.weight))
    logits = exact_x @ exact_weight.T
    close(gate_logits(x, router.weight).double(), logits.detach(), atol=1e-5)
    expected = plainly(logits, routing.topk_ids_TK, given)
    torch.testing.assert_close(routing.topk_weights_TK.double(), expected[0], rtol=1e-4, atol=1e-6)
    torch.autograd.backward(expected, (d_weights.double(), d_loss.double()))
    for got, exact, bound in ((router.weight.main_grad, exact_weight.grad, 1e-5), (x.grad, exact_x.grad, 4e-3)):
        assert (got.double() - exact).norm() <= bound * exact.norm()
