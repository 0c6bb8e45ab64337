"""YaRN past the original length: the logits of `transformers`, at positions spread over the whole extended context.

Positions are given, so that 48 tokens of a sequence span 160K of them: most pairs are further apart than the original
length, where the comparisons of `test_transformer` and `test_families` end a few tokens behind a short one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.model.config import ModelConfig
from fp8moe.model.transformer import Transformer
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE, pair
from tests.model.oracles.grouped import their_model
from tests.model.shapes import changed
from tests.model.test_families import QWEN3, ours_of

TOKENS = 48
# The rotations of DeepSeek-V3 (report, section 4.3) and of Qwen3's card, in models that are small otherwise.
CASES = {
    "deepseek_v3": changed(BASE, num_layers=2, rope_dim=64, max_seq_len=40 * 4096, yarn=YarnConfig()),
    "qwen3_moe": changed(
        QWEN3, num_layers=2, head_dim=128, rope_dim=128, max_seq_len=4 * 32768,
        yarn=YarnConfig(factor=4.0, original_max_seq_len=32768, mscale_all=0.0)
    ),
}  # fmt: skip


def models(name: str) -> tuple[Transformer, Any]:
    """Ours and that of `transformers` with the same weights, FP32; attention scores large enough to tell places."""
    if name == "deepseek_v3":
        return pair(CASES[name])
    ours = ours_of(CASES[name])
    return ours, their_model(name, CASES[name], ours.state_dict())


def our_logits(model: Transformer, ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
    assert model.embedding is not None and model.norm is not None and model.head is not None
    hidden_TD, _ = model.run_blocks(model.embedding(ids_BS.flatten()), model.positions(positions_BS))
    return model.head(model.norm(hidden_TD)).unflatten(0, ids_BS.shape)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_past_the_original_length_are_those_of_transformers(name: str) -> None:
    config: ModelConfig = CASES[name]
    yarn = config.attention.yarn
    assert yarn is not None
    ours, theirs = models(name)
    ids_BS = tokens(config.vocab_size, seq_len=TOKENS).inputs_BS
    last = config.max_seq_len - 1
    positions_BS = torch.linspace(0, last, TOKENS).long().expand_as(ids_BS)
    expected = theirs(
        ids_BS, position_ids=positions_BS, attention_mask=torch.ones_like(ids_BS)
    ).logits  # the mask, or jumps of positions would be taken for beginnings of documents
    past = positions_BS >= yarn.original_max_seq_len
    assert past.sum() > TOKENS and expected[past].abs().max() > 0.1, "the comparison would be blind"
    difference = (our_logits(ours, ids_BS, positions_BS) - expected).abs()
    assert difference.max() <= 1e-4
    near = our_logits(ours, ids_BS, torch.arange(TOKENS).expand_as(ids_BS))
    assert (near - expected)[past].abs().max() > 3e-2, "positions count"
