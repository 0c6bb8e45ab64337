"""Attention with documents and windows: kernels against a dense mask, and what those of variable length are told."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from fp8moe.layers.attention import core
from fp8moe.layers.attention.core import Positions, attend
from fp8moe.layers.attention.documents import Documents

H = 4
LENGTHS = (3, 3, 1, 3, 2)  # two sequences of 6 tokens


def by_formula(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, window: int | None = None) -> Tensor:
    """Softmax over a dense mask [B, S, S], made from the definition: same document, not later, within the window."""
    seq_len, place = q.shape[1], torch.arange(q.shape[1])
    seen = (place[:, None] >= place) & (place[:, None] - place < (window or seq_len))
    if lengths is not None:
        numbers = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)]).view(len(q), -1)
        seen = seen & (numbers[:, :, None] == numbers[:, None, :])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 0.3
    seen = seen if seen.dim() == 3 else seen.expand(len(q), -1, -1)
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1), v)


def place(lengths: tuple[int, ...] | None, tokens: int = 12) -> Positions:
    nothing = torch.empty(tokens, 0)
    return Positions(2, nothing, nothing, None if lengths is None else Documents(lengths, nothing.device))


def random_heads(keys: int, v_dim: int, seq_len: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (H, 24), (keys, 24), (keys, v_dim)
    return [torch.randn(2, seq_len, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("lengths", [None, LENGTHS, (1,) * 12, (6, 6)], ids=str)
@pytest.mark.parametrize("kernel, keys, v_dim", [("sdpa", H, 24), ("sdpa", 2, 24), ("blocked", H, 16)])
def test_attention_on_a_cpu_is_its_formula(
    kernel: str, keys: int, v_dim: int, lengths: tuple[int, ...] | None, window: int | None
) -> None:
    """Values and gradients in FP64 against a dense mask; documents of one token, and of whole sequences."""
    qkv = random_heads(keys, v_dim)
    out, expected = attend(kernel, *qkv, 0.3, place(lengths), window=window), by_formula(*qkv, lengths, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, qkv, dy) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_documents_know_their_borders() -> None:
    documents = Documents(LENGTHS, torch.device("cpu"))
    assert documents.longest == 3 and documents.cumulative_N.dtype is torch.int32
    assert documents.cumulative_N.tolist() == [0, 3, 6, 7, 10, 12]
    assert documents.numbers_T.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4]
    assert place(None).parts.lengths == (6, 6) and place(LENGTHS).parts.lengths == LENGTHS


def variable_length(told: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """A kernel of variable length as its libraries describe it: [T, H, d], cumulative lengths, a band to the left."""

    def attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, band: tuple[int, int], **options: Any) -> Tensor:
        told.append({**options, "band": band})
        assert ends.dtype is torch.int32 and band[1] == 0
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        parts = zip(*(x.split(ends.diff().tolist()) for x in (q, k, v)), strict=True)
        width = band[0] + 1 if band[0] >= 0 else None
        return torch.cat([by_formula(*(x[None] for x in part), None, width)[0] for part in parts])

    return attention


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,) * 12, None], ids=str)
def test_torchs_kernel_of_variable_length_is_given_lengths(
    lengths: tuple[int, ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    kernel = variable_length(told)
    known = inspect.signature(varlen.varlen_attn)

    def called(*args: Any, **options: Any) -> Tensor:
        given = known.bind(*args, **options).arguments
        assert given["cu_seq_q"] is given["cu_seq_k"] and given["max_q"] == given["max_k"] == max(lengths or (6, 6))
        assert given["scale"] == 0.3 and given.get("enable_gqa", False) == (given["key"].shape[1] != H)
        return kernel(given["query"], given["key"], given["value"], given["cu_seq_q"], given["window_size"])

    monkeypatch.setattr(varlen, "varlen_attn", called)
    for keys in (H, 2):
        qkv = random_heads(keys, 24)
        out = attend("varlen", *qkv, 0.3, place(lengths), window=window)
        torch.testing.assert_close(out, by_formula(*qkv, lengths, window))
    assert told == [{"band": (-1 if window is None else window - 1, 0)}] * 2


@pytest.mark.parametrize("window", [None, 2])
def test_flash_attention_is_given_the_lengths_of_documents(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    kernel = variable_length(told)

    def called(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Any:
        assert cu_seqlens_q is cu_seqlens_k
        return kernel(q, k, v, cu_seqlens_q, options.pop("window_size", (-1, 0)), **options), None

    cute = flash_attn_module(monkeypatch, flash_attn_varlen_func=called)
    assert cute is sys.modules["flash_attn.cute"]
    qkv = random_heads(H, 16)
    torch.testing.assert_close(
        attend("flash", *qkv, 0.3, place(LENGTHS), window=window), by_formula(*qkv, LENGTHS, window)
    )
    band = (-1 if window is None else window - 1, 0)
    assert told == [{"softmax_scale": 0.3, "causal": True, "max_seqlen_q": 3, "max_seqlen_k": 3, "band": band}]


def flash_attn_module(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> ModuleType:
    """A module flash_attn.cute with these functions."""
    made_up = ModuleType("flash_attn.cute")
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        setattr(made_up, name, functions.get(name))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", made_up)
    return made_up


def test_flex_attention_is_attention_by_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and without gradients, as far as a CPU goes."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(core, "_compiled_flex_attention", lambda: flex_attention)
    qkv = [x.detach().float() for x in random_heads(H, 16)]
    for lengths in (None, LENGTHS):
        for window in (None, 2):
            out = attend("flex", *qkv, 0.3, place(lengths), window=window)
            torch.testing.assert_close(out, by_formula(*qkv, lengths, window))
