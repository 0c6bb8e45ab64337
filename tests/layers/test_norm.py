"""RMSNorm against its formula, and its recomputation: the same bits from the input alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_memory import TrackStorages
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import activation, detached_handle
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute

T, D = 48, 64
NOTHING: frozenset[Recompute] = frozenset()


def norms(precision: Precision) -> list[RMSNorm]:
    made = [RMSNorm(D, Recipe(precision, names), eps=1e-6) for names in (NOTHING, FULL_RECOMPUTE)]
    for norm in made:
        torch.manual_seed(1)
        torch.nn.init.normal_(norm.weight)
    return made


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_norms_output_and_gradients_are_the_same_bits(precision: Precision) -> None:
    torch.manual_seed(0)
    x0, dy, other = torch.randn(3, T, D).to(precision.dtype)
    found = []
    for norm in norms(precision):
        x = x0.clone().requires_grad_()
        y = norm(x)
        # x has a second use, as in a residual stream: a third summand would be added in another order.
        torch.autograd.backward([y.tensor, x * 1.0], [dy, other])
        found.append([y.tensor.detach(), y.recall(), x.grad, norm.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    y, recalled, *_ = found[1]
    assert torch.equal(y, recalled) and y.data_ptr() != recalled.data_ptr()


@pytest.mark.parametrize("precision", list(Precision))
def test_a_recomputing_norm_keeps_its_input_alone(precision: Precision) -> None:
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    alive = []
    for norm in norms(precision):
        with TrackStorages() as tracked:
            y = norm(x)
            columns = activation(y, Recipe(precision)).operand.columns
            handle = detached_handle(y.tensor)
            del y
        alive.append(tracked.live_bytes())
        assert handle.isnan().all() and columns().shape in ((T, D), (D, T))
    assert alive[0] >= T * D * x.element_size() and alive[1] <= 8  # the NaN of the placeholder


@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["kept", "recomputed"])
def test_a_norm_is_its_formula(recompute: frozenset[Recompute]) -> None:
    norm = RMSNorm(D, Recipe(Precision.FP32, recompute), eps=0.25)
    assert torch.equal(norm.weight, torch.ones(D))
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    x, dy = torch.randn(2, T, D)
    x64, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 0.25).sqrt() * weight
    expected.backward(dy.double())
    y = norm(x.requires_grad_())
    y.tensor.backward(dy)
    assert x64.grad is not None and weight.grad is not None
    torch.testing.assert_close(y.tensor, expected.float())
    torch.testing.assert_close(x.grad, x64.grad.float())
    torch.testing.assert_close(norm.weight.grad, weight.grad.float())
    assert not y.recall().requires_grad
