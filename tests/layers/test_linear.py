"""A Linear's three products against FP64, in every precision, and when its weight gradient is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp8moe.layers.linear import Embedding, Linear, LinearPart, attach_main_grads, is_expert, product, quantize_weights
from fp8moe.layers.operand import activation
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import Precision, Recipe
from tests.distance import calc_diff

BOUND = {Precision.FP32: 1e-11, Precision.BF16: 1e-4, Precision.FP8: 1e-3}


def build(n_in: int, n_out: int, precision: Precision) -> Linear:
    torch.manual_seed(0)
    linear = Linear(n_in, n_out, Recipe(precision))
    with torch.no_grad():
        linear.weight.normal_(0, n_in**-0.5)
    attach_main_grads(linear)
    quantize_weights(linear)
    return linear


def tensors(linear: Linear, tokens: int) -> tuple[Tensor, Tensor]:
    n_out, n_in = linear.weight.shape
    dtype = linear.recipe.dtype
    return torch.randn(tokens, n_in).to(dtype).requires_grad_(), torch.randn(tokens, n_out).to(dtype) * 2**-20


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("n_in, n_out, tokens", [(256, 128, 64), (2112, 576, 48), (16, 144, 160)])
def test_products_against_fp64(precision: Precision, n_in: int, n_out: int, tokens: int) -> None:
    linear = build(n_in, n_out, precision)
    x, dy = tensors(linear, tokens)
    y = linear(x)
    y.backward(dy)
    w64, x64, dy64 = linear.weight.detach().double(), x.detach().double(), dy.double()
    assert x.grad is not None
    assert linear.weight.grad is None
    bound = BOUND[precision]
    assert calc_diff(y.detach(), x64 @ w64.T, x64, w64) <= bound
    assert calc_diff(x.grad, dy64 @ w64, dy64, w64.T) <= bound
    assert calc_diff(linear.weight.main_grad, dy64.T @ x64, dy64.T, x64.T) <= bound  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("at_once", [False, True])
def test_parts_make_the_whole(precision: Precision, at_once: bool) -> None:
    """Outputs and weight gradients of parts are rows of the whole's, the input's gradients add up to it."""
    whole, linear = (build(256, 640, precision) for _ in range(2))
    with torch.no_grad():
        for one in (whole, linear):  # rows of other sizes, or one block's scale would do for another
            one.weight *= 2.0 ** torch.arange(640).div(128, rounding_mode="floor")[:, None]
            one.quantize()
    x, dy = tensors(linear, 64)
    y = whole(x)
    y.backward(dy)
    expected = x.grad
    x.grad = None
    parts = [slice(0, 128), slice(128, 512), slice(512, 640)]
    wgrads, given = DeferredWgrads(), activation(x, linear.recipe, power_of_two=linear.recipe.power_of_two(False))
    for rows in parts:
        out = LinearPart(linear, rows, at_once=at_once)(given)
        torch.testing.assert_close(out, y[:, rows], rtol=1e-6, atol=0.0)
        with wgrads.collect():
            out.backward(dy[:, rows])
        assert bool(linear.weight.main_grad[rows].any()) == at_once  # type: ignore[index]
    wgrads.run()
    assert expected is not None and x.grad is not None
    assert calc_diff(x.grad, expected.double(), dy.double(), whole.weight.detach().double().T) <= BOUND[precision]
    torch.testing.assert_close(linear.weight.main_grad, whole.weight.main_grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("precision", list(Precision))
def test_main_grad_accumulates_over_micro_batches(precision: Precision) -> None:
    linear = build(128, 64, precision)
    x, dy = tensors(linear, 32)
    linear(x).backward(dy)
    once = linear.weight.main_grad.clone()  # type: ignore[operator]
    linear(x).backward(dy)
    torch.testing.assert_close(linear.weight.main_grad, 2 * once)


def test_weights_are_quantized_when_told_and_not_before() -> None:
    linear = build(128, 64, Precision.FP8)
    x, _ = tensors(linear, 16)
    before = linear(x).detach()
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(linear(x), before)
    quantize_weights(linear)
    assert torch.equal(linear(x), 2 * before)


def test_blocks_follow_a_loaded_state() -> None:
    """Blocks are of the loaded weight, forward and transposed, also where the module is deep inside a model."""
    loaded, other = build(128, 64, Precision.FP8), build(128, 64, Precision.FP8)
    with torch.no_grad():
        other.weight.mul_(2).add_(0.1)
    quantize_weights(other)
    x, dy = tensors(loaded, 16)
    model = nn.Sequential(nn.Sequential(loaded))
    model.load_state_dict({"0.0.weight": other.weight.detach()})
    assert torch.equal(model(x), other(x))
    (dx,) = torch.autograd.grad(loaded(x), x, dy)
    assert torch.equal(dx, torch.autograd.grad(other(x), x, dy)[0])


def test_an_unquantized_weight_is_refused() -> None:
    linear = Linear(128, 64, Recipe(Precision.FP8))
    with pytest.raises(AssertionError, match="quantize_weights"):
        linear(torch.zeros(16, 128, dtype=torch.bfloat16))


def test_each_pass_runs_its_own_weight_gradients() -> None:
    """Two micro-batches whose weight gradients wait: running one's adds its gradient and not the other's."""
    linear = build(128, 64, Precision.FP8)
    main_grad: Tensor = linear.weight.main_grad  # type: ignore[assignment]
    at_once, waiting = [], []
    for scale in (1.0, 3.0):
        x, dy = tensors(linear, 32)
        linear(x).backward(dy * scale)
        at_once.append(main_grad.clone())
        main_grad.zero_()
        wgrads = DeferredWgrads()
        with wgrads.collect():
            linear(x).backward(dy * scale)
        waiting.append(wgrads)
    assert not main_grad.any() and [len(wgrads) for wgrads in waiting] == [1, 1]
    waiting[1].run()
    assert torch.equal(main_grad, at_once[1]) and [len(wgrads) for wgrads in waiting] == [1, 0]
    main_grad.zero_()
    waiting[0].run()
    assert torch.equal(main_grad, at_once[0])
    waiting[0].run()
    assert torch.equal(main_grad, at_once[0]), "a weight gradient that ran is forgotten"


def test_an_input_without_gradient_gets_none_and_the_weight_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = build(128, 64, Precision.FP8)
    x, dy = tensors(linear, 32)
    linear(x).backward(dy)
    expected = linear.weight.main_grad.clone()  # type: ignore[operator]
    linear.weight.main_grad.zero_()  # type: ignore[operator]
    monkeypatch.setattr(Linear, "dgrad", lambda *_: pytest.fail("nobody asks for this product"))
    linear(x.detach()).backward(dy)
    assert torch.equal(linear.weight.main_grad, expected)


@pytest.mark.parametrize("avx512", [False, True])
def test_products_in_bf16_are_rounded_once_on_any_cpu(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.layers.linear._CPU_MULTIPLIES_BF16", avx512)
    torch.manual_seed(0)
    a, b = torch.randn(48, 512).bfloat16(), torch.randn(512, 32).bfloat16()
    exact = a.double() @ b.double()
    got = product(a, b)
    assert got.dtype is torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("precision", list(Precision))
def test_the_embedding_sums_in_fp32(precision: Precision) -> None:
    """A row of ones a thousand times and a small one: in BF16 the sum would stop at 256."""
    embedding = Embedding(5, 16, Recipe(precision))
    torch.nn.init.normal_(embedding.weight)
    attach_main_grads(embedding)
    ids = torch.tensor([1] * 1000 + [3, 1])
    y = embedding(ids)
    assert torch.equal(y, embedding.weight.detach()[ids]) and y.dtype is precision.dtype
    dy = torch.ones_like(y)
    dy[1001] = 0.125
    y.backward(dy)
    main_grad: Tensor = embedding.weight.main_grad  # type: ignore[assignment]
    assert main_grad[:, 0].tolist() == [0, 1000.125, 0, 1, 0] and embedding.weight.grad is None
    wgrads = DeferredWgrads()
    with wgrads.collect():
        embedding(ids).backward(dy)
    assert main_grad[1, 0] == 1000.125
    wgrads.run()
    assert main_grad[1, 0] == 2000.25


def model() -> nn.Module:
    made = nn.ParameterDict({
        "first": nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)),
        "expert": nn.Parameter(torch.ones(4, 5)),
        "second": nn.Parameter(torch.ones(7)),
    })  # fmt: skip
    made["expert"].is_expert = True  # type: ignore[attr-defined]
    return made


def test_main_grads_are_views_of_two_flat_buffers_in_order() -> None:
    parameters = model()
    flat = attach_main_grads(parameters)
    assert (flat.dense.numel(), flat.expert.numel()) == (6 + 7, 20)
    first, expert, second = (parameters[name] for name in ("first", "expert", "second"))
    assert [is_expert(p) for p in (first, expert, second)] == [False, True, False]
    for parameter, buffer, at in ((first, flat.dense, 0), (second, flat.dense, 6), (expert, flat.expert, 0)):
        assert parameter.main_grad.shape == parameter.shape and parameter.main_grad.dtype is torch.float32
        assert parameter.main_grad.data_ptr() == buffer[at:].data_ptr()
    assert not flat.dense.any() and not flat.expert.any()
    flat.dense.fill_(1)
    flat.expert.fill_(1)
    flat.zero_()
    assert not flat.dense.any() and not flat.expert.any()


def test_autograds_gradients_are_moved_over_and_added() -> None:
    parameters = model()
    attach_main_grads(parameters)
    for _ in range(2):
        (parameters["second"] * torch.arange(7.0)).sum().backward()
    assert parameters["second"].grad is None
    assert parameters["second"].main_grad.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert not parameters["first"].main_grad.any()


def test_experts_alone_leave_the_dense_buffer_empty() -> None:
    parameters = nn.ParameterDict({"expert": nn.Parameter(torch.ones(2, 2))})
    parameters["expert"].is_expert = True  # type: ignore[attr-defined]
    flat = attach_main_grads(parameters)
    assert (flat.dense.numel(), flat.expert.numel()) == (0, 4)
