"""Impossible models are refused with the rule, the numbers and what would do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.hf_oracle import BASE
from tests.model.shapes import changed


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 100}, "^model.dim=100 must be a multiple of 16, which FP8 needs: use 96$"),
        ({"dim": 105}, "model.dim=105 .* use 112"),
        ({"dense_hidden": 100}, "model.dense_hidden=100 .* use 96"),
        ({"expert_hidden": 1}, "model.experts.hidden=1 must be a multiple of 16, which FP8 needs: use 16"),
        ({"q_lora_rank": 24}, "model.attention.q_lora_rank=24 must be a multiple of 16"),
        ({"kv_lora_rank": 40}, "model.attention.kv_lora_rank=40 must be a multiple of 16"),
        ({"rope_dim": 8}, r"model.attention.kv_lora_rank \+ rope_dim=40 .* use"),
        ({"num_heads": 1, "nope_dim": 24}, r"model.attention.num_heads \* \(nope_dim \+ rope_dim\)=40 "),
        ({"num_heads": 1, "v_dim": 24}, r"model.attention.num_heads \* \(nope_dim \+ v_dim\)=40 "),
        ({"num_groups": 3, "top_groups": 1}, "model.router.num_groups=3 does not divide num_experts=8: use 2"),
        ({"num_dense_layers": 4}, "model.num_dense_layers=4 must be between 0 and num_layers=3"),
        ({"num_dense_layers": -1}, "model.num_dense_layers=-1 must be at least 0: use 0 for none"),
        ({"dense_layers": (0,)}, r"dense_layers=\[0\] must ascend, from num_dense_layers=1 to 2, .*: use \[\]"),
        ({"dense_layers": (2, 1)}, r"dense_layers=\[2, 1\] must ascend, .* use \[1, 2\]"),
        ({"dense_layers": (1, 1, 3)}, r"dense_layers=\[1, 1, 3\] must ascend, .* use \[1\]"),
        ({"mtp_depth": 2}, "model.mtp_depth=2 must be at least 0 and at most 1: use 1"),
        *(({name: 0}, f"^model.{name}=0 must be at least 1: use 1 or more$")
          for name in ("vocab_size", "dim", "num_layers", "dense_hidden", "max_seq_len")),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        changed(BASE, **change)


@pytest.mark.parametrize("num_dense_layers, more, mtp_depth, dense, has_experts", [
    (0, (), 0, [False, False, False, False], True),
    (1, (), 0, [True, False, False, False], True),
    (0, (1,), 0, [False, True, False, False], True),
    (1, (2,), 0, [True, False, True, False], True),
    (0, (1, 2), 0, [False, True, True, False], True),
    (0, (0, 1, 2), 0, [True, True, True, False], False),
    (3, (), 0, [True, True, True, False], False),
    (1, (1, 2), 1, [True, True, True, False], True),
    (3, (), 1, [True, True, True, False], True),
])  # fmt: skip
def test_dense_blocks_are_those_named_and_the_mtp_block_has_experts(
    num_dense_layers: int, more: tuple[int, ...], mtp_depth: int, dense: list[bool], has_experts: bool
) -> None:
    config = changed(BASE, num_dense_layers=num_dense_layers, dense_layers=more, mtp_depth=mtp_depth)
    assert [config.is_dense(layer) for layer in range(4)] == dense
    assert config.has_experts is has_experts
