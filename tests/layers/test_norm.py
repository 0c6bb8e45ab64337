"""RMSNorm against its formula, what it writes for whom, and its recomputation: the same bits from the input alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.live_memory import TrackStorages
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_columns, quantize_rows
from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.norm import Feeds, RMSNorm
from fp8moe.layers.operand import Normed, Rows, activation, detached_handle, placeholder, recast
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute

T, D = 48, 64
NOTHING: frozenset[Recompute] = frozenset()
FP8 = Recipe(Precision.FP8)


def build(recipe: Recipe, feeds: Feeds = Feeds.TENSOR, eps: float = 1e-6) -> RMSNorm:
    norm = RMSNorm(D, recipe, eps=eps, feeds=feeds)
    assert torch.equal(norm.weight, torch.ones(D, dtype=recipe.dtype))
    torch.manual_seed(1)
    torch.nn.init.normal_(norm.weight)
    attach_main_grads(norm)
    torch.manual_seed(0)
    return norm


def norms(precision: Precision, feeds: Feeds = Feeds.TENSOR) -> list[RMSNorm]:
    return [build(Recipe(precision, names), feeds) for names in (NOTHING, FULL_RECOMPUTE)]


def gain_of(norm: RMSNorm) -> Tensor:
    assert norm.weight.grad is None
    return norm.weight.main_grad.clone()  # type: ignore[operator]


def same(a: Rows, b: Rows) -> bool:
    assert isinstance(a, Fp8Tensor) and isinstance(b, Fp8Tensor)
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("residual", [False, True])
def test_a_norms_output_and_gradients_are_the_same_bits(precision: Precision, residual: bool) -> None:
    found, both = [], norms(precision)
    x0, delta0, dy, other = torch.randn(4, T, D).to(precision.dtype)
    for norm in both:
        x, delta = x0.clone().requires_grad_(), delta0.clone().requires_grad_()
        h, y = norm.with_residual(x, delta) if residual else (x * 1.0, norm(x))
        torch.autograd.backward([y.tensor, h], [dy, other])
        assert not residual or torch.equal(h, x0 + delta0)
        found.append([y.tensor.detach(), y.recall(), x.grad, delta.grad if residual else x.grad, gain_of(norm)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    y_value, recalled, dx, d_delta, _ = found[1]
    assert torch.equal(y_value, recalled) and y_value.data_ptr() != recalled.data_ptr()
    assert torch.equal(dx, d_delta)


@pytest.mark.parametrize("feeds", list(Feeds))
@pytest.mark.parametrize("precision", list(Precision))
def test_a_recomputing_norm_keeps_its_input_and_a_number_a_row(precision: Precision, feeds: Feeds) -> None:
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    alive = []
    placeholder(x.shape, x.detach())  # its one NaN is kept for good
    for norm in norms(precision, feeds):
        with TrackStorages() as tracked:
            y = norm(x)
            columns = activation(y, Recipe(precision), power_of_two=norm.power_of_two).operand.columns
            handle = detached_handle(y.tensor)
            del y
        alive.append(tracked.live_bytes())
        assert handle.isnan().all() and columns().shape in ((T, D), (D, T))
    assert alive[0] == alive[1] + T * D * x.element_size() and alive[1] <= 4 * T + 8


@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("feeds", [Feeds.LINEAR, Feeds.MLP, Feeds.MOE])
def test_under_fp8_a_norm_casts_for_its_consumer(feeds: Feeds, recompute: frozenset[Recompute]) -> None:
    recipe = Recipe(Precision.FP8, recompute)
    norm, plain = build(recipe, feeds), build(Recipe(Precision.BF16))
    x = torch.randn(T, D).bfloat16()
    y, expected = norm(x), plain(x).tensor.detach()
    power_of_two = feeds is not Feeds.LINEAR
    operand = activation(y, recipe, power_of_two=power_of_two).operand
    assert same(operand.rows, quantize_rows(expected, power_of_two=power_of_two))
    assert same(operand.columns(), quantize_columns(expected, power_of_two=power_of_two))
    assert same(recast(y, recipe)(), operand.rows)
    assert torch.equal(y.recall(), expected)
    if feeds is Feeds.MOE or not recompute:
        assert torch.equal(y.tensor, expected)
    else:
        assert y.tensor.isnan().all() and y.tensor.untyped_storage().nbytes() == 2, "nobody reads y: it is not written"
    with pytest.raises(AssertionError, match=f"power_of_two={power_of_two}, its consumer wants {not power_of_two}"):
        activation(y, recipe, power_of_two=not power_of_two)


def test_without_fp8_or_for_other_consumers_the_tensor_is_given() -> None:
    x = torch.randn(T, D).bfloat16()
    for norm in (build(Recipe(Precision.BF16), Feeds.MOE), build(FP8)):
        y = norm(x)
        assert isinstance(y, Normed) and y.cast is None and not y.tensor.isnan().any()
        assert torch.equal(recast(y, Recipe(Precision.BF16))(), y.tensor)  # type: ignore[arg-type]
    assert same(recast(y, FP8)(), quantize_rows(y.tensor.detach()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["kept", "recomputed"])
def test_a_norm_is_its_formula(recompute: frozenset[Recompute], residual: bool) -> None:
    norm = build(Recipe(Precision.FP32, recompute), eps=0.25)
    x, dy, dh = torch.randn(3, T, D)
    x64, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 0.25).sqrt() * weight
    ((expected * dy.double()).sum() + (x64 * dh.double()).sum() * residual).backward()
    x.requires_grad_()
    h, y = norm.with_residual(x) if residual else (x, norm(x))
    ((y.tensor * dy).sum() + (h * dh).sum() * residual).backward()
    assert x64.grad is not None and weight.grad is not None
    torch.testing.assert_close(y.tensor, expected.float())
    torch.testing.assert_close(x.grad, x64.grad.float())
    torch.testing.assert_close(gain_of(norm), weight.grad.float())
    assert not y.recall().requires_grad


def test_a_residual_stream_whose_norm_is_not_used_passes_its_gradient_on() -> None:
    norm = build(Recipe(Precision.FP32))
    x, delta, dh = torch.randn(3, T, D)
    h, _ = norm.with_residual(x.requires_grad_(), delta.requires_grad_())
    h.backward(dh)
    assert x.grad is not None and delta.grad is not None
    assert torch.equal(x.grad, dh) and torch.equal(delta.grad, dh) and not gain_of(norm).any()


def test_the_gains_gradient_is_as_exact_as_fp32() -> None:
    """From BF16 tensors, against FP64; autograd's BF16 `.grad` added to `main_grad` was off by 1.7e-3."""
    norm = build(Recipe(Precision.BF16))
    x, dy = torch.randn(2, 1024, D).bfloat16()
    norm(x).tensor.backward(dy)
    x64 = x.double()
    exact = (x64 * (x64.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * dy.double()).sum(0)
    assert (gain_of(norm) - exact).norm() <= 1e-5 * exact.norm()


def test_gradients_of_a_gain_add_up_in_fp32() -> None:
    norm = build(Recipe(Precision.BF16))
    x, dy = torch.randn(2, T, D).bfloat16()
    norm(x).tensor.backward(dy)
    once = gain_of(norm)
    for _ in range(3):
        norm(x).tensor.backward(dy)
    torch.testing.assert_close(gain_of(norm), 4 * once)
