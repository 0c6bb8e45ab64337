"""Which matrices a weight is made of: experts apart, and Linears whose weights were joined; which weights have none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from fp8moe.layers.attention.mla import MlaConfig
from fp8moe.layers.linear import Embedding, Linear, matrices
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import Experts, ExpertsConfig, GroupedLinear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Precision, Recipe

FP32 = Recipe(Precision.FP32)


def test_matrices_of_a_weight() -> None:
    assert matrices(Linear(5, 3, FP32).weight) == [(0, 15, 3, 5)]
    assert matrices(GroupedLinear(2, 5, 3, FP32).weight) == [(0, 15, 3, 5), (15, 30, 3, 5)]
    assert matrices(Mlp(5, 3, FP32).gate_up.weight) == [(0, 15, 3, 5), (15, 30, 3, 5)]
    assert matrices(Mlp(5, 3, FP32).down.weight) == [(0, 15, 5, 3)]
    experts = Experts(3, 5, ExpertsConfig(3, 2), FP32)
    assert matrices(experts.gate_up.weight) == [(10 * i, 10 * i + 10, 2, 5) for i in range(6)]
    assert matrices(RMSNorm(4, FP32, eps=1e-6).weight) == [] == matrices(Parameter(torch.ones(3, 3)))
    assert matrices(Embedding(5, 3, FP32).weight) == [] == matrices(Linear(5, 3, FP32, matrix_rows=()).weight)
    mla = MlaConfig(num_heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=2, v_dim=4, q_lora_rank=6)
    layer = mla.build(16, FP32, norm_eps=1e-6, layer=0)
    assert matrices(layer.qkv_a.weight) == [(0, 96, 6, 16), (96, 256, 10, 16)]
    assert matrices(layer.kv_b.weight) == [(0, 128, 16, 8)], "heads are not apart"
    plain = replace(mla, q_lora_rank=0).build(16, FP32, norm_eps=1e-6, layer=0)
    assert matrices(plain.qkv_a.weight) == [(0, 192, 12, 16), (192, 352, 10, 16)]
    wrong = Linear(5, 3, FP32, matrix_rows=(2, 2))
    with pytest.raises(ValueError, match=r"matrix_rows=\(2, 2\) have 4 rows and the weight \[3, 5\] has 3"):
        matrices(wrong.weight)
