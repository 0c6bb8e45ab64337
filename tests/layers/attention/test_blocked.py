"""Attention by blocks of queries: values and gradients of its formula in FP64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.layers.attention import blocked
from fp8moe.layers.attention.blocked import blocked_attention
from fp8moe.layers.recompute import capture_saved


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    seen = torch.ones(q.shape[1], q.shape[1]).tril().bool()
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def inputs(dtype: torch.dtype, seq_len: int) -> list[Tensor]:
    torch.manual_seed(seq_len)
    made = [torch.randn(3, seq_len, 2, width).to(dtype) for width in (24, 24, 16)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("seq_len", [1, 5, 64, 70, 200])
@pytest.mark.parametrize("scores", [1, 1 << 14, 1 << 18], ids=["a head", "some heads", "all heads"])
def test_values_and_gradients(
    dtype: torch.dtype, bound: float, seq_len: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_SCORES", scores)
    q_k_v, exact = inputs(dtype, seq_len), [x.detach().double().requires_grad_() for x in inputs(dtype, seq_len)]
    before = [x.detach().clone() for x in q_k_v]
    out, expected = blocked_attention(*q_k_v, 0.3), formula(*exact, 0.3)
    assert out.dtype is dtype and out.shape == expected.shape
    dy = torch.randn(expected.shape).to(dtype)
    gradients, exact_gradients = torch.autograd.grad(out, q_k_v, dy), torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in zip((out, *gradients), (expected, *exact_gradients), strict=True):
        assert got.dtype is dtype
        assert (got.double() - wanted).norm() <= bound * wanted.norm() + 1e-9
    assert all(torch.equal(x, was) for x, was in zip(q_k_v, before, strict=True))


def test_the_future_is_not_read() -> None:
    q, k, v = inputs(torch.bfloat16, 70)
    with torch.no_grad():
        expected = blocked_attention(q, k, v, 0.3)[:, :66]
        k[:, 66:], v[:, 66:] = 1e4, 1e4
        assert torch.equal(blocked_attention(q, k, v, 0.3)[:, :66], expected)


def test_nothing_but_its_inputs_is_kept() -> None:
    q_k_v = inputs(torch.bfloat16, 70)
    with capture_saved() as captured:
        blocked_attention(*q_k_v, 0.3)
    kept = [saved.tensor for saved in captured]
    assert [x.data_ptr() for x in kept if x is not None] == [x.data_ptr() for x in q_k_v]
