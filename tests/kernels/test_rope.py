"""RoPE with the concatenation by the specification: complex numbers forward, FP64 autograd backward."""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward

DTYPES = [torch.bfloat16, torch.float32]
SIZES = [(6, 5, 32, 16, 48), (1, 1, 1, 2, 1), (130, 40, 16, 6, 16), (5, 3, 0, 8, 16)]  # T, H, nope, rope, v


@pytest.fixture(autouse=True)
def specification():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns with NaN
    backend.set_backend("reference")
    yield
    backend.set_backend(None)
    torch.use_deterministic_algorithms(False)


def operands(t, h, nope, rope, v, dtype):
    """q, kv, the shared rotary part as a column slice, cos, sin."""
    angles = torch.randn(t, rope // 2) * 10
    q, kv = torch.randn(t, h, nope + rope).to(dtype), torch.randn(t, h, nope + v).to(dtype)
    return q, kv, torch.randn(t, rope + 16).to(dtype)[:, 16:], angles.cos(), angles.sin()


def turned(x, cos, sin):
    """x [..., rope] rotated in FP64, pair (2i, 2i+1) by angle i, first members before second ones."""
    z = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * torch.complex(cos.double(), sin.double())
    return torch.cat([z.real, z.imag], -1)


def composed(q, kv, k_rope, cos, sin, nope):
    """The same by slices, rotation and concatenation, in FP64."""
    at = cos[:, None], sin[:, None]
    queries = torch.cat([q[..., :nope], turned(q[..., nope:], *at)], -1)
    shared = turned(k_rope[:, None], *at).expand(-1, q.shape[1], -1)
    return queries, torch.cat([kv[..., :nope], shared], -1), kv[..., nope:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_the_composition(sizes, dtype):
    nope = sizes[2]
    *tensors, cos, sin = operands(*sizes, dtype)
    wide = [x.double().requires_grad_() for x in tensors]
    expected = composed(*wide, cos, sin, nope)
    q, kv, k_rope = tensors
    bound = {"rtol": 2.0**-8, "atol": 2.0**-7} if dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    got = rope_queries(q, cos, sin), rope_keys(kv, k_rope, cos, sin, nope_dim=nope)
    for ours, theirs in zip(got, expected, strict=False):
        assert ours.dtype is dtype and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs.detach(), **bound)
        assert torch.equal(ours[..., :nope].double(), theirs[..., :nope])
    grads = [torch.randn(x.shape).to(dtype) for x in expected]
    exact = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    dq, dk, dv = grads
    ours = rope_queries_backward(dq, cos, sin), *rope_keys_backward(dk, dv, cos, sin)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype is dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=bound["rtol"], atol=4 * bound["atol"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_sums_are_fp32_and_rounded_once(dtype):
    q, kv, k_rope, cos, sin = operands(24, 3, 16, 32, 16, dtype)

    def by_hand(x, cos, sin):
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(dtype)

    assert torch.equal(rope_queries(q, cos, sin)[..., 16:], by_hand(q[..., 16:], cos[:, None], sin[:, None]))
    keys = rope_keys(kv, k_rope, cos, sin, nope_dim=16)
    assert torch.equal(keys[..., 16:], by_hand(k_rope, cos, sin)[:, None].expand(-1, 3, -1))


def test_the_shared_parts_gradient_is_summed_in_fp32():
    """A thousand small gradients beside a large one: summed in BF16 they would be lost."""
    dk = torch.full((1, 1001, 18), 2.0**-9).bfloat16()
    dk[0, 0] = 1
    _, d_rope = rope_keys_backward(dk, dk[..., :16], torch.ones(1, 1), torch.zeros(1, 1))
    assert torch.equal(d_rope, torch.full((1, 2), 1 + 1000 * 2.0**-9).bfloat16())


def test_the_shared_parts_gradient_is_rounded_once():
    dk, angles = torch.randn(64, 5, 48).bfloat16(), torch.randn(64, 16)
    _, d_rope = rope_keys_backward(dk, dk, angles.cos(), angles.sin())
    first, second = dk[..., 16:].double().sum(1).chunk(2, dim=-1)
    turned_back = torch.complex(first, second) * torch.polar(torch.ones(64, 16), -angles)
    assert torch.equal(d_rope, torch.view_as_real(turned_back).flatten(-2).bfloat16())


def test_views_by_head_and_nothing_at_all():
    q, kv, k_rope, cos, sin = operands(4, 3, 16, 16, 16, torch.float32)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, kv)]
    assert torch.equal(rope_queries(swapped[0], cos, sin), rope_queries(q, cos, sin))
    assert torch.equal(
        rope_keys(swapped[1], k_rope, cos, sin, nope_dim=16), rope_keys(kv, k_rope, cos, sin, nope_dim=16)
    )
    assert rope_queries(q[:0], cos[:0], sin[:0]).shape == (0, 3, 32)
    d_kv, d_rope = rope_keys_backward(q[:0], kv[:0, :, 16:], cos[:0], sin[:0])
    assert d_kv.shape == (0, 3, 32) and d_rope.shape == (0, 16)


def test_what_does_not_fit_is_refused():
    q, kv, k_rope, cos, sin = operands(4, 3, 16, 16, 16, torch.float32)
    for call, words in (
        (lambda: rope_queries(q.flatten(1), cos, sin), r"q \[T, H, d\].*\[4, 96\]"),
        (lambda: rope_queries(q.half(), cos, sin), "float16"),
        (lambda: rope_queries(q, cos[1:], sin[1:]), r"cos and sin \[4, rope/2\], got \[3, 8\]"),
        (lambda: rope_queries(q, cos, sin[:, 1:]), r"\[4, 8\] and \[4, 7\]"),
        (lambda: rope_queries(q, cos.double(), sin), "in FP32, got torch.float64"),
        (lambda: rope_queries_backward(q[..., :12], cos, sin), "at least 16 features a head for dq, got 12"),
        (lambda: rope_keys(kv, k_rope[:, 2:], cos, sin, nope_dim=16), r"k_rope \[4, 16\].*\[4, 14\]"),
        (lambda: rope_keys(kv, k_rope, cos, sin, nope_dim=33), "at least 33 features a head for kv, got 32"),
        (lambda: rope_keys_backward(q, kv[1:], cos, sin), r"dv \[4, 3, v\].*\[3, 3, 32\]"),
        (lambda: rope_keys_backward(q, kv.bfloat16(), cos, sin), "float32.*bfloat16"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
