"""Impossible models are refused with the rule, the numbers and what would do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fp8moe.model.config import YarnConfig
from tests.model.hf_oracle import BASE


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 100}, "model.dim=100 is no multiple of 16, as FP8 needs: use 96"),
        ({"expert_hidden": 1}, "use 16"),
        ({"kv_lora_rank": 40}, "model.kv_lora_rank=40 is no multiple of 16"),
        ({"rope_dim": 8}, r"model.kv_lora_rank \+ rope_dim=40"),
        ({"num_groups": 3, "top_groups": 1}, "model.num_groups=3 does not divide num_experts=8: use 2"),
        ({"top_groups": 5}, "model.top_groups=5 exceeds num_groups=4: use at most 4"),
        ({"topk": 5}, "model.topk=5 exceeds the 4 experts of top_groups=2 groups: use at most 4"),
        ({"num_dense_layers": 4}, "between 0 and num_layers=3"),
        ({"mtp_depth": 2}, "use 0 or 1"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
        ({"num_shared_experts": -1}, "use 0 for none"),
        ({"score": "tanh"}, "use sigmoid or softmax"),
        ({"attention": "fast"}, "use sdpa or flash"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(BASE, **change)


def test_yarn_scales_as_published() -> None:
    v3 = YarnConfig(factor=40.0, original_max_seq_len=4096)
    assert v3.softmax_factor == pytest.approx((0.1 * 3.6888794541139363 + 1) ** 2)
    assert v3.amplitude == 1.0
    assert replace(BASE, yarn=v3).softmax_scale == pytest.approx(BASE.softmax_scale * v3.softmax_factor)
    with pytest.raises(ValueError, match="use 1 or more"):
        YarnConfig(factor=0.5)
