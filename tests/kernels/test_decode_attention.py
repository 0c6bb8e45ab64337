"""Attention to a cache beside a plain softmax in FP64, sequence by sequence and head by head."""

from __future__ import annotations

import re

import pytest
import torch

from fp8moe.kernels.decode_attention import decode_attention
from fp8moe.kernels.reference import decode_attention as twin
from tests.kernels.caches import CACHES, Cache, by_hand, filled

SCALE = 0.3


def attend(cache: Cache, **changed: object) -> torch.Tensor:
    given = {"length": cache.length, "scale": SCALE, "window": cache.window}
    tensors = (cache.q, cache.keys, cache.values, cache.positions, cache.rows, cache.sinks)
    return decode_attention(*tensors, **{**given, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_sequences_beside_a_plain_softmax(name: str, dtype: torch.dtype) -> None:
    """What is behind a token, and rows that no sequence has, are noise."""
    cache = filled(name, dtype)
    found = attend(cache)
    assert found.dtype is dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2.0**-7, "atol": 4e-3}
    torch.testing.assert_close(found.double(), by_hand(cache, SCALE), **tolerance)


@pytest.mark.parametrize("at_once", [1, 250, 1 << 20])
def test_sequences_that_are_widened_together_change_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Entries of one sequence, of two (the last alone), of all."""
    for name in ("latents", "heads"):
        cache = filled(name, torch.bfloat16)
        whole = attend(cache)
        monkeypatch.setattr(twin, "WIDENED_VALUES", at_once * cache.keys.shape[2] * cache.keys.shape[3] // 8)
        torch.testing.assert_close(attend(cache), whole, rtol=2.0**-7, atol=1e-3)


def test_scores_are_sums_in_fp32() -> None:
    """A score of 4096 + 1/4 rounded to BF16 would make both entries alike."""
    q = torch.tensor([64.0, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    keys = torch.tensor([[64.0, 0.25], [64.0, 0.0]], dtype=torch.bfloat16).view(1, 2, 1, 2)
    values = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16).view(1, 2, 1, 1)
    found = decode_attention(q, keys, values, torch.tensor([[1]]), length=2, scale=8.0)
    assert found.item() == pytest.approx(torch.tensor(2.0).sigmoid().item(), rel=2.0**-7)


def test_nothing_to_attend() -> None:
    keys = torch.empty(3, 5, 2, 8)
    found = decode_attention(
        torch.empty(0, 1, 4, 8), keys, keys, torch.empty(0, 1, dtype=torch.int64), length=5, scale=1
    )
    assert found.shape == (0, 1, 4, 8)


BAD = {
    "unflatten them": {"q": torch.empty(1, 4, 8)},
    "all BF16, or all FP32": {"q": torch.empty(1, 1, 4, 8, dtype=torch.bfloat16)},
    "as many features as a key has": {"q": torch.empty(1, 1, 4, 16)},
    "a multiple of the key heads": {"q": torch.empty(1, 1, 3, 8)},
    "positions must be [1, 1] torch.int64, got [2, 1] torch.int64": {"positions": torch.zeros(2, 1, dtype=torch.int64)},
    "rows must be [1] torch.int64, got [1] torch.int32": {"rows": torch.zeros(1, dtype=torch.int32)},
    "sinks must be [4] torch.float32, got [4] torch.bfloat16": {"sinks": torch.zeros(4, dtype=torch.bfloat16)},
    "4 sequences have 3 rows of entries": {
        "q": torch.empty(4, 1, 4, 8),
        "positions": torch.zeros(4, 1, dtype=torch.int64),
    },
    "length=6 must be from 1 to the 5 entries of a row: use 5": {"length": 6},
    "window=0 must be at least 1: use None": {"window": 0},
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_does_not_fit_is_refused(sentence: str) -> None:
    keys = torch.zeros(3, 5, 2, 8)
    given: dict[str, object] = {
        "q": torch.zeros(1, 1, 4, 8), "keys": keys, "values": keys, "positions": torch.zeros(1, 1, dtype=torch.int64),
        "length": 5, "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(sentence)):
        decode_attention(**{**given, **BAD[sentence]})  # type: ignore[arg-type]
