"""Rows of a rank's experts: padded groups against draws of routing, and experts in turn against counting."""

from __future__ import annotations

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.plan.expert_rows import expert_rows
from fp8moe.train.config import TrainConfig, resolve

TILE = 128


def resolved(micro_batch: int, force_balance: bool) -> TrainConfig:
    """64 experts on 8 ranks, 6 a token, sequences of 2,048."""
    words = ["model=dsv2_lite_16b", "seq_len=2048", "batch.sequences=64", "parallel.ep=8", "validation.samples=64"]
    words += [f"batch.micro_batch={micro_batch}", f"model.router.force_balance={str(force_balance).lower()}"]
    return resolve(compose(words).config, 8)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_padding_is_that_of_drawn_routing(micro_batch: int) -> None:
    """Of tokens that choose their experts evenly a rank's 8 groups end anywhere in a tile: half of one is empty."""
    config = resolved(micro_batch, force_balance=False)
    generator = torch.Generator().manual_seed(0)
    tokens, padded = 8 * 2048 * micro_batch, []
    for _ in range(8):
        chosen = torch.rand(tokens, 64, generator=generator).topk(6, dim=1).indices
        counts = chosen.flatten().bincount(minlength=64).view(8, 8)
        padded.append((-(-counts // TILE) * TILE).sum(1).double().mean())
    drawn = float(torch.stack(padded).mean())
    assert expert_rows(config).experts == pytest.approx(drawn, rel=0.01)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_experts_in_turn_are_padded_as_they_are(micro_batch: int) -> None:
    """Token t takes experts 6t to 6t + 5, modulo 64: every expert of a rank has the same number but for one."""
    taken = torch.arange(8 * 2048 * micro_batch * 6) % 64
    counts = taken.bincount(minlength=64)
    assert len(set(counts.tolist())) == 1
    padded = int((-(-counts[:8] // TILE) * TILE).sum())
    assert expert_rows(resolved(micro_batch, force_balance=True)).experts == padded
