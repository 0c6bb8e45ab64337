"""Multi-head latent attention: what its configuration answers against the built layer, documents, freed heads.

The layer's values and gradients are compared with `transformers` in tests/model/test_transformer.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.live_memory import TrackStorages
from fp8moe.layers.attention import core
from fp8moe.layers.attention.mla import LatentAttention, MlaConfig
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.linear import Linear, attach_main_grads, quantize_weights
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import DEFAULT_RECOMPUTE, FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.layers.recompute import kept

CONFIG = MlaConfig(num_heads=2, q_lora_rank=32, kv_lora_rank=48, nope_dim=16, rope_dim=16, v_dim=16)
UNEQUAL = MlaConfig(num_heads=3, q_lora_rank=48, kv_lora_rank=32, nope_dim=32, rope_dim=16, v_dim=64)
# Heads of equal size: PyTorch's fused attention on a CPU, which saves q, k and v themselves.
FUSED = MlaConfig(num_heads=4, q_lora_rank=64, kv_lora_rank=32, nope_dim=16, rope_dim=16, v_dim=32)
DIM, B, S, EPS = 64, 2, 32, 1e-6
FP32 = Recipe(Precision.FP32)


def build(config: MlaConfig = CONFIG, recipe: Recipe = FP32) -> LatentAttention:
    torch.manual_seed(0)
    attention = config.build(DIM, recipe, norm_eps=1e-3, layer=0)  # the model's, not the latents'
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    quantize_weights(attention)
    return attention


def arange(batch: int = B, seq_len: int = S) -> Tensor:
    return torch.arange(seq_len).expand(batch, -1)


def test_masked_documents_see_nothing_of_each_other() -> None:
    attention, x = build(), torch.randn(12, DIM)
    restart = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    together = attention(x, CONFIG.positions(restart, (5, 7)))
    first = attention(x[:5], CONFIG.positions(restart[:, :5]))
    second = attention(x[5:], CONFIG.positions(restart[:, 5:]))
    torch.testing.assert_close(together, torch.cat([first, second]))
    unmasked = attention(x, CONFIG.positions(restart))
    assert not torch.allclose(unmasked[5:], second, atol=1e-3)


def test_positions_have_the_rotations_and_the_documents_of_the_batch() -> None:
    positions = replace(CONFIG, rope_theta=100.0).positions(torch.tensor([[0, 1, 0], [0, 0, 1]]), (2, 1, 1, 2))
    angles = torch.tensor([0, 1, 0, 0, 0, 1])[:, None] * 100.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(positions.cos, angles.cos())
    torch.testing.assert_close(positions.sin, angles.sin())
    assert positions.num_sequences == 2 and positions.documents is not None
    assert positions.documents.numbers_T.tolist() == [0, 0, 1, 2, 3, 3]
    assert CONFIG.positions(arange()).documents is None


@pytest.mark.parametrize("change, words", [
    *(({name: 0}, rf"^model\.attention\.{name}=0 must be at least 1: use 1 or more$")
      for name in ("num_heads", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim")),
    ({"q_lora_rank": -1}, r"model\.attention\.q_lora_rank=-1 must be at least 0: use 0 for none"),
    ({"rope_dim": 15}, r"model\.attention\.rope_dim=15 must be even, to rotate pairs: use 16"),
    ({"backend": "fast"}, r"model\.attention\.backend='fast' .*use auto, sdpa, cudnn, varlen, flex or flash"),
])  # fmt: skip
def test_impossible_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


def test_odd_numbers_of_pairs_and_sizes_of_one_are_legal() -> None:
    """What FP8 needs of sizes is the model's to check; attention alone wants pairs."""
    small = MlaConfig(num_heads=1, kv_lora_rank=1, nope_dim=1, rope_dim=6, v_dim=1)
    assert small.q_lora_rank == 0 and small.qk_dim == 7


def test_what_follows_from_the_sizes() -> None:
    assert (UNEQUAL.qk_dim, UNEQUAL.queries) == (48, 144)
    assert UNEQUAL.softmax_scale == pytest.approx(48**-0.5)
    yarn = YarnConfig(factor=40.0)
    assert replace(UNEQUAL, yarn=yarn).softmax_scale == pytest.approx(48**-0.5 * yarn.softmax_factor)
    assert list(UNEQUAL.fp8_sizes().values()) == [48, 32, 48, 144, 288, 192]


@pytest.mark.parametrize("config", [CONFIG, UNEQUAL, replace(UNEQUAL, q_lora_rank=0)], ids=["", "unequal", "no latent"])
def test_parameters_and_linears_are_those_of_the_built_layer(config: MlaConfig) -> None:
    attention = build(config)
    built = [module for module in attention.modules() if isinstance(module, Linear)]
    assert Counter(config.linears(DIM)) == Counter(tuple(linear.weight.shape) for linear in built)
    assert config.num_parameters(DIM) == sum(p.numel() for p in attention.parameters())
    norms = [module for module in attention.modules() if isinstance(module, RMSNorm)]
    assert {norm.eps for norm in norms} == {EPS} and len(norms) == (2 if config.q_lora_rank else 1)
    own = build(replace(config, norm_eps=1e-2))
    assert {module.eps for module in own.modules() if isinstance(module, RMSNorm)} == {1e-2}


def test_core_flops_are_two_a_multiply_add_over_the_keys() -> None:
    products = 3 * 100 * 48 + 3 * 100 * 64  # heads x keys x features: scores, then values
    assert UNEQUAL.core_flops(100, causal=False, layer=0) == 2 * products
    assert UNEQUAL.core_flops(100, causal=True, layer=3) == products


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("latent", [64, 0], ids=["", "no query latent"])
@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, FULL_RECOMPUTE - {Recompute.MLA_UP}], ids=["all", "heads kept"])
def test_kept_bytes_are_those_of_a_forward(precision: Precision, latent: int, recompute: frozenset[Recompute]) -> None:
    config, recipe = replace(FUSED, q_lora_rank=latent), Recipe(precision, recompute)
    attention, positions = build(config, recipe), config.positions(arange())
    x = kept(torch.randn(B * S, DIM).to(recipe.dtype).requires_grad_())
    with TrackStorages() as tracked:
        y = attention(x, positions)
    cast_input = B * S * 0
    assert tracked.live_bytes() - y.untyped_storage().nbytes() - cast_input == pytest.approx(
        B * S * config.kept_bytes(recipe), rel=0.01
    )


def test_kept_bytes_without_any_recomputation() -> None:
    """Per token, in BF16: latents and rotary key, both 1/rms, output, log-sum-exp; both norms' outputs; q, k (wide and
    up), v."""
    kept_always = 2 * (48 + 32 + 16) + 2 * 4 + 2 * 3 * 64 + 4 * 3
    heads = 2 * 3 * (48 + 48 + 32 + 64)
    assert UNEQUAL.kept_bytes(Recipe(Precision.BF16, FULL_RECOMPUTE)) == kept_always
    assert UNEQUAL.kept_bytes(Recipe(Precision.BF16)) == kept_always + 2 * (48 + 32) + heads
    assert UNEQUAL.kept_bytes(Recipe(Precision.FP8)) == pytest.approx(
        kept_always + 2 * (48 + 32) + heads - (2 - 1.5 - 4 / 128) * 3 * 64
    )
    no_latent = replace(UNEQUAL, q_lora_rank=0)
    assert no_latent.kept_bytes(Recipe(Precision.BF16, DEFAULT_RECOMPUTE)) == kept_always - 4 + 2 * (96 + 32) + heads


@pytest.mark.parametrize("recompute", [DEFAULT_RECOMPUTE, FULL_RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", list(Precision))
def test_recomputed_heads_are_freed_and_made_once_more(
    precision: Precision, recompute: frozenset[Recompute], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward's q, k and v die with it under mla_up; so do, after their use, those that the backward makes."""
    attention = build(FUSED, Recipe(precision, recompute))
    made: list[StorageWeakRef] = []
    heads = LatentAttention.heads_of

    def watched(self: LatentAttention, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv = heads(self, *inputs)
        made.extend(StorageWeakRef(t.untyped_storage()) for t in qkv)
        return qkv

    monkeypatch.setattr(LatentAttention, "heads_of", watched)
    x = torch.randn(B * S, DIM).to(precision.dtype).requires_grad_()
    y = attention(x, FUSED.positions(arange()))
    recomputing = recompute is FULL_RECOMPUTE
    assert len(made) == 3 and [ref.expired() for ref in made] == [recomputing] * 3
    y.sum().backward(retain_graph=True)
    assert len(made) == (6 if recomputing else 3)
    if recomputing:
        assert all(ref.expired() for ref in made), "what the backward made again is released after its last use"


@pytest.mark.parametrize("precision, alive", [(Precision.BF16, True), (Precision.FP8, False)])
def test_the_bf16_output_dies_with_the_forward(
    precision: Precision, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = build(FUSED, Recipe(precision))
    seen: list[StorageWeakRef] = []

    def watched(*inputs: Any) -> Tensor:
        out = core._sdpa(*inputs)
        assert out.grad_fn is not None and "FlashAttention" in out.grad_fn.next_functions[0][0].name()
        seen.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setitem(core.BACKENDS, "sdpa", watched)
    y = attention(torch.randn(B * S, DIM).to(precision.dtype).requires_grad_(), FUSED.positions(arange()))
    assert seen[0].expired() is not alive
    y.sum().backward()


def test_the_configured_back_end_gets_the_scale_and_a_document_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, backend="sdpa", yarn=YarnConfig(factor=4.0, original_max_seq_len=16))
    calls: list[tuple[Any, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append((q.shape, k.shape, v.shape, scale))
        return v

    monkeypatch.setitem(core.BACKENDS, "sdpa", attend)
    build(config)(torch.randn(12, DIM), config.positions(arange(2, 6), (4, 2, 6)))
    assert [call[:3] for call in calls] == [((1, n, 2, 32), (1, n, 2, 32), (1, n, 2, 16)) for n in (4, 2, 6)]
    assert {call[3] for call in calls} == {config.softmax_scale}
