"""What the comparison with `transformers` can't see: the document mask, and requests that can't be met."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8moe.layers.attention.mla import AttentionConfig, LatentAttention, Positions, document_mask
from fp8moe.layers.recipe import Precision
from fp8moe.layers.rope import inverse_frequencies, rotate, rotation
from fp8moe.layers.wgrad import attach_main_grads

CONFIG = AttentionConfig(
    dim=64, num_heads=2, q_lora_rank=32, kv_lora_rank=32, nope_dim=16, rope_dim=16, v_dim=16, softmax_scale=32**-0.5,
    norm_eps=1e-6,
)  # fmt: skip


def build() -> LatentAttention:
    torch.manual_seed(0)
    attention = LatentAttention(CONFIG, precision=Precision.FP32)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    return attention


def positions(ids: torch.Tensor, documents_BS: torch.Tensor | None) -> Positions:
    cos, sin = rotation(ids.flatten(), inverse_frequencies(16, 1e4))
    return Positions(len(ids), cos, sin, None if documents_BS is None else document_mask(documents_BS))


def test_masked_documents_see_nothing_of_each_other() -> None:
    attention, x = build(), torch.randn(12, 64)
    restart = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    together = attention(x, positions(restart, torch.tensor([[0] * 5 + [1] * 7])))
    first = attention(x[:5], positions(restart[:, :5], None))
    second = attention(x[5:], positions(restart[:, 5:], None))
    torch.testing.assert_close(together, torch.cat([first, second]))
    unmasked = attention(x, positions(restart, None))
    assert not torch.allclose(unmasked[5:], second, atol=1e-3)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotation(torch.tensor([p]), inverse_frequencies(16, 1e4)) for p in (i, j)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def test_flash_attention_that_is_not_here_is_refused() -> None:
    attention = LatentAttention(replace(CONFIG, kind="flash"), precision=Precision.FP32)
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match=r"model\.attention=sdpa"):
        attention(torch.randn(4, 64), positions(ids, None))
    with pytest.raises(ValueError, match="knows no document mask"):
        attention(torch.randn(4, 64), positions(ids, torch.zeros(1, 4)))
