"""Attention of a part's queries: the zigzag, who meets whom, and each kernel against a dense mask of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from fp8moe.layers.attention import core
from fp8moe.layers.attention.context import Context
from fp8moe.layers.attention.core import Positions, attend, keys_in_order
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.masks import causal_mask
from fp8moe.layers.attention.zigzag import joined_parts, part_of, parts_of
from tests.layers.attention.test_documents import by_formula, flash_attn_module

CPU = torch.device("cpu")
H = 4
LENGTHS = (1, 10, 13, 5, 3, 16)  # two sequences of 24 tokens


class Place:
    """An exchange that knows its place and sends nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def _refused(self, *args: Any) -> Any:
        raise AssertionError("core attention sends nothing")

    gather = scatter = total = _refused


def context(rank: int, cp: int, seq_len: int, lengths: tuple[int, ...] | None, sequences: int = 2) -> Context:
    nothing = torch.empty(sequences * seq_len, 0)
    return Context(Place(rank, cp), sequences, nothing, nothing, None if lengths is None else Documents(lengths, CPU))


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_the_zigzag_pairs_an_early_chunk_with_a_late_one(cp: int) -> None:
    x_BS = torch.arange(2 * 24).view(2, 24)
    size = 24 // (2 * cp)
    for rank in range(cp):
        early, late = rank * size, 24 - (rank + 1) * size
        expected = torch.cat([x_BS[:, early : early + size], x_BS[:, late : late + size]], dim=1)
        assert torch.equal(part_of(x_BS, rank, cp), expected)
    x_Tn = torch.randn(48, 3)
    parts = parts_of(x_Tn, 2, cp)
    assert parts.is_contiguous() and torch.equal(joined_parts(parts, 2), x_Tn)
    for rank in range(cp):
        assert torch.equal(parts[rank], part_of(x_Tn.view(2, 24, 3), rank, cp).flatten(0, 1))
    wider = torch.empty(cp, 48 // cp, 5).fill_(torch.nan)
    wider[:, :, 1:4] = parts
    assert torch.equal(joined_parts(wider[:, :, 1:4], 2), x_Tn)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_every_query_meets_its_document_up_to_itself(data: st.DataObject, cp: int, size: int, sequences: int) -> None:
    seq_len = 2 * cp * size
    lengths: list[int] = []
    for _ in range(sequences):
        left = seq_len
        while left:
            lengths.append(data.draw(st.integers(1, left)))
            left -= lengths[-1]
    start_of = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
    tokens = torch.arange(sequences * seq_len).view(sequences, seq_len)
    for rank in range(cp):
        mine, met = part_of(tokens, rank, cp).flatten().tolist(), []
        for run in context(rank, cp, seq_len, tuple(lengths), sequences).runs:
            query, key = run.queries.start, run.keys.start
            for queries, keys in zip(run.query_parts.lengths, run.key_parts.lengths, strict=True):
                for i in range(queries):
                    met.append((mine[query + i], (key, key + keys - queries + i)))
                query, key = query + queries, key + keys
            assert (query, key) == (run.queries.stop, run.keys.stop)
        assert met == [(token, (start_of[token], token)) for token in mine]


def random_heads(keys: int, v_dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (H, 24), (keys, 24), (keys, v_dim)
    return [torch.randn(2, 24, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def in_parts(kernel: str, qkv: list[Tensor], cp: int, lengths: tuple[int, ...] | None, window: int | None) -> Tensor:
    """Attention of every rank's queries to all keys, put together again; gradients of keys add up over the ranks."""
    q, k, v = qkv
    outputs = []
    for rank in range(cp):
        mine = part_of(q, rank, cp)
        nothing = torch.empty(mine.shape[0] * mine.shape[1], 0)
        where = context(rank, cp, 24, lengths)
        keys, values = (keys_in_order(kernel, x, where) for x in (k, v))
        positions = Positions(2, nothing, nothing, context=where)
        outputs.append(attend(kernel, mine, keys, values, 0.3, positions, window=window).flatten(2).flatten(0, 1))
    return joined_parts(torch.stack(outputs), 2).view(2, 24, H, -1)


@pytest.mark.parametrize("window", [None, 5, 24])
@pytest.mark.parametrize("lengths", [None, LENGTHS, (1,) * 48], ids=["none", "some", "ones"])
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("kernel, keys, v_dim", [("sdpa", H, 24), ("sdpa", 2, 24), ("blocked", H, 16)])
def test_parts_are_the_whole_on_a_cpu(
    kernel: str, keys: int, v_dim: int, cp: int, lengths: tuple[int, ...] | None, window: int | None
) -> None:
    qkv = random_heads(keys, v_dim)
    out, expected = in_parts(kernel, qkv, cp, lengths, window), by_formula(*qkv, lengths, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, qkv, dy) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 17), (64, 128), (70, 199), (128, 256)])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_blocks_of_queries_meet_more_keys(queries: int, keys: int, window: int | None, with_sinks: bool) -> None:
    """Blocks of both lengths that begin together and that don't, against FP64."""
    torch.manual_seed(1)
    sizes = ((2, queries, 4, 6), (2, keys, 2, 6), (2, keys, 2, 5), (4,))
    inputs = [torch.randn(*size, requires_grad=True) for size in sizes][: 4 if with_sinks else 3]
    out = core.blocked_attention(*inputs[:3], 0.4, window=window, sinks=inputs[3] if with_sinks else None)
    q, k, v, *sinks = (x.detach().double().requires_grad_() for x in inputs)
    k_H, v_H = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k_H) * 0.4
    scores = scores.masked_fill(~causal_mask(queries, keys, window, CPU), float("-inf"))
    scores = torch.cat([scores, *(s[None, :, None, None].expand(2, -1, queries, 1) for s in sinks)], dim=-1)
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1)[..., :keys], v_H)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dy)
    wanted = torch.autograd.grad(expected, [q, k, v, *sinks], dy.double())
    torch.testing.assert_close([x.double() for x in got], list(wanted), rtol=1e-4, atol=5e-5)


def by_lengths(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, band: tuple[int, int]) -> Tensor:
    """A kernel of variable length as its libraries describe it: each document's last query is at its last key."""
    assert ends.dtype is key_ends.dtype is torch.int32 and band[1] == 0 and len(ends) == len(key_ends)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for start, stop, first, last in zip(ends[:-1], ends[1:], key_ends[:-1], key_ends[1:], strict=True):
        scores = torch.einsum("shd,thd->hst", q[start:stop], k[first:last]) * 0.3
        mask = causal_mask(int(stop - start), int(last - first), band[0] + 1 if band[0] >= 0 else None, CPU)
        outputs.append(
            torch.einsum("hst,thd->shd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v[first:last])
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["none", "some"])
def test_kernels_of_variable_length_are_given_both_lengths(
    lengths: tuple[int, ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torchs(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int,
               *, window_size: tuple[int, int], **options: Any) -> Tensor:  # fmt: skip
        assert longest == int(ends.diff().max()) and longest_key == int(key_ends.diff().max())
        return by_lengths(q, k, v, ends, key_ends, window_size)

    def flash(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
              max_seqlen_k: int, window_size: Any = (-1, 0), **options: Any) -> tuple[Tensor, None]:  # fmt: skip
        assert options == {"softmax_scale": 0.3, "causal": True}
        assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
        return by_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size), None

    monkeypatch.setattr(varlen, "varlen_attn", torchs)
    flash_attn_module(monkeypatch, flash_attn_varlen_func=flash)
    for kernel, keys, v_dim in (("varlen", 2, 24), ("varlen", H, 24), ("flash", H, 16)):
        qkv = random_heads(keys, v_dim)
        out = in_parts(kernel, qkv, 2, lengths, window)
        torch.testing.assert_close(out, by_formula(*qkv, lengths, window))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["none", "some"])
def test_flex_attention_knows_the_places_of_queries(
    lengths: tuple[int, ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(core, "_compiled_flex_attention", lambda: flex_attention)
    qkv = [x.detach() for x in random_heads(2, 16)]  # it has no backward on a CPU
    torch.testing.assert_close(in_parts("flex", qkv, 3, lengths, window), by_formula(*qkv, lengths, window))
