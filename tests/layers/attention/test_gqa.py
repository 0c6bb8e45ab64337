"""Grouped-query attention: values and gradients against its formula in FP64, its configuration against the built layer.

The layer's values and gradients are compared with `transformers` in tests/model/test_families.py.
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
from fp8moe.layers.attention.choice import Heads
from fp8moe.layers.attention.gqa import GqaConfig, GroupedQueryAttention
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.linear import Linear, attach_main_grads, main_grad_of, matrices, quantize_weights
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe
from fp8moe.layers.recompute import kept

CONFIG = GqaConfig(num_heads=4, num_kv_heads=2, head_dim=32, rope_dim=16)
EVERYTHING = replace(CONFIG, qk_norm="head", qkv_bias=True, o_bias=True, clip_qkv=0.8)
FULL = replace(EVERYTHING, num_heads=8, num_kv_heads=4, head_dim=16, qk_norm="full")
DIM, B, S, EPS = 64, 2, 32, 1e-5
FP32 = Recipe(Precision.FP32)
CASES = {
    "plain": CONFIG,
    "everything": EVERYTHING,
    "full norm": FULL,
    "full norm, not clipped": replace(FULL, clip_qkv=None),
    "one key head": replace(CONFIG, num_kv_heads=1, qk_norm="head"),
    "a key head each": replace(CONFIG, num_kv_heads=4, rope_dim=32, qkv_bias=True),
}


def build(config: GqaConfig = CONFIG, recipe: Recipe = FP32) -> GroupedQueryAttention:
    torch.manual_seed(0)
    attention = config.build(DIM, recipe, norm_eps=EPS, layer=0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    quantize_weights(attention)
    return attention


def arange(batch: int = B, seq_len: int = S) -> Tensor:
    return torch.arange(seq_len).expand(batch, -1)


def formula(c: GqaConfig, weights: dict[str, Tensor], x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """x [T, D] -> [T, D] head by head, in the dtype of `weights`; seen [S, S]: which keys a query may see."""
    angles = positions[:, None] * c.rope_theta ** (-torch.arange(0, c.rope_dim, 2, dtype=x.dtype) / c.rope_dim)
    turn = torch.polar(torch.ones_like(angles), angles)

    def normed(values: Tensor, name: str) -> Tensor:
        rms = (values.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        return values / rms * weights[f"{name}_norm.weight"]

    def rotated(head: Tensor) -> Tensor:
        pairs = head[:, c.head_dim - c.rope_dim :].reshape(len(head), -1, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(1)
        return torch.cat([head[:, : c.head_dim - c.rope_dim], turned], -1)

    y = x @ weights["qkv.weight"].T + weights.get("qkv_bias", 0)
    q, k, v = y.split([c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim], -1)
    if c.qk_norm == "full":
        q, k = normed(q, "q"), normed(k, "k")
    heads = {"q": q.split(c.head_dim, -1), "k": k.split(c.head_dim, -1), "v": v.split(c.head_dim, -1)}
    if c.qk_norm == "head":
        heads |= {name: tuple(normed(head, name) for head in heads[name]) for name in "qk"}
    if c.clip_qkv is not None:
        heads = {name: tuple(head.clamp(-c.clip_qkv, c.clip_qkv) for head in found) for name, found in heads.items()}
    outs = []
    for h, query in enumerate(heads["q"]):
        g = h // (c.num_heads // c.num_kv_heads)
        scores = rotated(query) @ rotated(heads["k"][g]).T / c.head_dim**0.5
        outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ heads["v"][g])
    return torch.cat(outs, -1) @ weights["o.weight"].T + weights.get("o_bias", 0)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case: str, masked: bool) -> None:
    config = CASES[case]
    attention = build(config)
    x, dy = torch.randn(2, S, DIM)
    x.requires_grad_()
    y = attention(x, config.positions(arange(1), (9, S - 9) if masked else None))
    y.backward(dy)

    weights = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    wide = x.detach().double().requires_grad_()
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    if masked:
        seen[9:, :9] = False
    expected = formula(config, weights, wide, torch.arange(S).double(), seen)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in [*attention.named_parameters(), ("x", x)]:
        found = x.grad if name == "x" else main_grad_of(parameter)  # type: ignore[arg-type]
        wanted = wide.grad if name == "x" else weights[name].grad
        assert found is not None and wanted is not None
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_fp8_is_near_fp32(case: str) -> None:
    """Output and every gradient within what two E4M3 casts and BF16 cost."""
    found = []
    x, dy = torch.randn(2, B * S, DIM, generator=torch.Generator().manual_seed(1))
    for precision in (Precision.FP32, Precision.FP8):
        attention = build(replace(CASES[case], clip_qkv=None), Recipe(precision))
        given = x.clone().to(precision.dtype).requires_grad_()
        y = attention(given, CASES[case].positions(arange()))
        y.backward(dy.to(precision.dtype))
        assert given.grad is not None and y.dtype is precision.dtype
        found.append([y.detach(), given.grad, *(main_grad_of(p).clone() for p in attention.parameters())])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded.float()).norm() <= 0.15 * exact.norm()


def test_yarn_turns_pairs_slower_and_scales_scores() -> None:
    yarn = YarnConfig(factor=40.0)
    assert replace(CONFIG, yarn=yarn).softmax_scale == pytest.approx(32**-0.5 * yarn.softmax_factor)
    plain, long = CONFIG.positions(arange()), replace(CONFIG, yarn=yarn).positions(arange())
    assert plain.cos.shape == long.cos.shape == (B * S, 8) and not torch.equal(plain.cos, long.cos)


@pytest.mark.parametrize("change, words", [
    *(({name: 0}, rf"^model\.attention\.{name}=0 must be at least \d: use \d or more$")
      for name in ("num_heads", "num_kv_heads", "head_dim", "rope_dim")),
    ({"num_kv_heads": 3}, r"^model\.attention\.num_kv_heads=3 does not divide num_heads=4: use 2$"),
    ({"num_kv_heads": 8}, r"num_kv_heads=8 does not divide num_heads=4: use 4"),
    ({"rope_dim": 7}, r"^model\.attention\.rope_dim=7 must be even, to rotate pairs, and at most head_dim=32: use 8$"),
    ({"rope_dim": 34}, r"rope_dim=34 must be even, .*: use 32"),
    ({"head_dim": 9, "rope_dim": 9}, r"rope_dim=9 must be even, .*: use 8"),
    ({"qk_norm": "heads"}, r"qk_norm='heads' does not exist: use none, head or full"),
    ({"clip_qkv": 0.0}, r"clip_qkv=0\.0 must be above 0: use null for none"),
    ({"window": 0}, r"window=0 must be at least 1: use null for none"),
])  # fmt: skip
def test_impossible_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_linears_are_those_of_the_built_layer(case: str) -> None:
    config = CASES[case]
    attention = build(config)
    built = [module for module in attention.modules() if isinstance(module, Linear)]
    assert Counter(config.linears(DIM)) == Counter(tuple(linear.weight.shape) for linear in built)
    assert config.num_parameters(DIM) == sum(p.numel() for p in attention.parameters())
    norms = [module for module in attention.modules() if isinstance(module, RMSNorm)]
    assert [norm.eps for norm in norms] == [EPS] * (0 if config.qk_norm == "none" else 2)
    assert list(config.fp8_sizes().values()) == [attention.qkv.weight.shape[0], attention.o.weight.shape[1]]
    q, k, v = matrices(attention.qkv.weight)
    rows = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    assert [matrix.n for matrix in (q, k, v)] == rows
    biases = {name for name, p in attention.named_parameters() if matrices(p) == [] and "norm" not in name}
    assert biases == {name for name in ("qkv_bias", "o_bias") if getattr(config, name)}
    assert replace(config, sinks=True).num_parameters(DIM) == config.num_parameters(DIM) + config.num_heads


def test_core_flops_count_the_keys_that_are_seen() -> None:
    each = 2 * 4 * 2 * 32  # of a key: heads x features, scores and values
    assert CONFIG.core_flops(100, causal=False, layer=0) == 100 * each
    assert CONFIG.core_flops(100, causal=True, layer=0) == 50 * each
    windowed = replace(CONFIG, window=8, window_layers="odd")
    assert [windowed.window_of(layer) for layer in range(4)] == [None, 8, None, 8]
    assert [replace(windowed, window_layers="even").window_of(layer) for layer in range(3)] == [8, None, 8]
    assert [replace(windowed, window_layers="all").window_of(layer) for layer in range(2)] == [8, 8]
    assert windowed.core_flops(100, causal=True, layer=2) == 50 * each
    triangle = sum(min(i + 0.5, 8) for i in range(8)) / 100 + 8 * 92 / 100  # half of the diagonal, as without a window
    assert windowed.core_flops(100, causal=True, layer=1) == pytest.approx(triangle * each)
    assert windowed.core_flops(100, causal=False, layer=1) == 8 * each
    assert windowed.core_flops(6, causal=True, layer=1) == 3 * each


@pytest.mark.parametrize("recompute", [frozenset(), FULL_RECOMPUTE], ids=["nothing", "all"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("case", [*CASES, "clipped"])
def test_kept_bytes_are_those_of_a_forward(case: str, precision: Precision, recompute: frozenset[Any]) -> None:
    config = replace(CONFIG, clip_qkv=0.5) if case == "clipped" else CASES[case]
    recipe = Recipe(precision, recompute)
    attention, positions = build(config, recipe), config.positions(arange())
    x = kept(torch.randn(B * S, DIM).to(recipe.dtype).requires_grad_())
    with TrackStorages() as tracked:
        y = attention(x, positions)
    assert tracked.live_bytes() - y.untyped_storage().nbytes() == pytest.approx(
        B * S * config.kept_bytes(recipe), rel=0.01
    )


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("case", CASES)
def test_recomputed_heads_are_freed_and_change_no_bit(
    case: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = CASES[case], []
    made: list[StorageWeakRef] = []
    heads = GroupedQueryAttention.heads_of

    def watched(self: GroupedQueryAttention, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv = heads(self, *inputs)
        made.extend(StorageWeakRef(t.untyped_storage()) for t in qkv[:2])
        return qkv

    monkeypatch.setattr(GroupedQueryAttention, "heads_of", watched)
    for recompute in (frozenset(), FULL_RECOMPUTE):
        attention = build(config, Recipe(precision, recompute))
        made.clear()
        x = torch.randn(B * S, DIM).to(precision.dtype).requires_grad_()
        y = attention(x, config.positions(arange()))
        assert [ref.expired() for ref in made] == [bool(recompute)] * 2
        y.square().sum().backward(retain_graph=True)
        assert len(made) == (4 if recompute else 2)
        assert not recompute or all(ref.expired() for ref in made), "what backward made is released after its use"
        assert x.grad is not None
        found.append([y.detach(), x.grad, *(main_grad_of(p).clone() for p in attention.parameters())])
    assert all(torch.equal(kept_, again) for kept_, again in zip(*found, strict=True))


@pytest.mark.parametrize("precision, alive", [(Precision.BF16, True), (Precision.FP8, False)])
def test_the_bf16_output_dies_with_the_forward(
    precision: Precision, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StorageWeakRef] = []

    def watched(*inputs: Any) -> Tensor:
        out = core._sdpa(*inputs)
        assert out.grad_fn is not None and "FlashAttention" in out.grad_fn.next_functions[0][0].name()
        seen.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setitem(core.BACKENDS, "sdpa", watched)
    attention = build(EVERYTHING, Recipe(precision))
    y = attention(torch.randn(B * S, DIM).to(precision.dtype).requires_grad_(), CONFIG.positions(arange()))
    assert seen[0].expired() is not alive
    y.sum().backward()


def test_weight_and_bias_gradients_wait_for_their_turn() -> None:
    attention = build(EVERYTHING)
    wgrads = DeferredWgrads()
    y = attention(torch.randn(B * S, DIM), EVERYTHING.positions(arange()))
    with wgrads.collect():
        y.sum().backward()
    waiting = {"qkv.weight", "qkv_bias", "o.weight", "o_bias"}
    assert len(wgrads) == 4 and not any(main_grad_of(attention.get_parameter(name)).any() for name in waiting)
    wgrads.run()
    assert all(main_grad_of(parameter).any() for parameter in attention.parameters())


def test_a_group_of_queries_is_told_to_the_kernel() -> None:
    assert CONFIG.heads(FP32, masked=True) == Heads(32, 32, torch.float32, True, 2)
    assert str(CONFIG.heads(FP32, masked=False)) == "32/32 heads, 2 queries a key, causal"
