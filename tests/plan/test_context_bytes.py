"""Bytes of layers whose keys come from other ranks: against the tensors that a layer makes, and by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.live_memory import TrackPeak
from fp8moe.cli.compose import compose
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.attention import GqaConfig, MlaConfig, context_bytes, core, gqa, latent_context
from fp8moe.layers.attention.choice import Choice
from fp8moe.layers.attention.context import Context, leaves
from fp8moe.layers.attention.context_bytes import (
    context_message_bytes,
    context_work_bytes,
    key_heads_at_once,
    ring_row_bytes,
    row_bytes,
    whole_keys_bytes,
)
from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.phase import DeferredWgrads, run_detached
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.parallel.dispatch import payload
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.train.config import TrainConfig, resolve
from tests.layers.attention.test_context import Place

BF16, FP8 = (Recipe(precision, FULL_RECOMPUTE, gathered=True) for precision in (Precision.BF16, Precision.FP8))
MLA = MlaConfig(num_heads=16, kv_lora_rank=32, nope_dim=32, rope_dim=16, v_dim=32, q_lora_rank=32)
GQA = GqaConfig(num_heads=16, num_kv_heads=4, head_dim=32, rope_dim=32)
S, D = 512, 64


def v3(*words: str, name: str = "dsv3_extend_128k") -> TrainConfig:
    return compose([f"experiment={name}", "data.paths=[a]", "parallel.layout=null", *words]).config


def test_a_row_beside_ring_attentions() -> None:
    """DeepSeek-V3's figures of docs/planning.md; rows as they are packed for a message."""
    a = v3().model.attention
    assert isinstance(a, MlaConfig)
    assert (row_bytes(a, BF16), ring_row_bytes(a, BF16)) == (1152, 81920) and row_bytes(a, FP8) == 644
    latents, rope = torch.randn(4, a.kv_lora_rank).bfloat16(), torch.randn(4, a.rope_dim).bfloat16()
    fp8 = quantize_rows(latents, power_of_two=True)
    assert payload.row_bytes(fp8) + payload.row_bytes(rope) == row_bytes(a, FP8)
    assert payload.row_bytes(latents) + payload.row_bytes(rope) == row_bytes(a, BF16)
    grouped = compose(["model=qwen3_30b_a3b"]).config.model.attention
    assert row_bytes(grouped, BF16) == row_bytes(grouped, FP8) == ring_row_bytes(grouped, BF16) == 2 * 2 * 4 * 128


class Kernel(torch.autograd.Function):
    """A kernel of attention as its memory is seen: what it saves, and gradients; no values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(one) for one in ctx.saved_tensors[:3])


def varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Tensor:
    out: Tensor = Kernel.apply(q, k, v)
    return out


def peaks(a: MlaConfig | GqaConfig, recipe: Recipe, cp: int, rank: int) -> tuple[int, int]:
    """Bytes that the forward and the backward of a layer's attn phase take at most, beyond what was alive before."""
    torch.manual_seed(0)
    layer = a.build(D, recipe, norm_eps=1e-6, layer=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    attach_main_grads(layer)
    part, whole = (a.positions(torch.arange(length)[None]) for length in (S // cp, S))
    positions = replace(part, context=Context(Place(rank, cp), 1, whole.cos, whole.sin, None))
    x_TD = torch.randn(S // cp, D, dtype=torch.bfloat16)
    with TrackPeak() as tracked:
        local = layer.local(x_TD, positions)
        arrived, own, state = leaves([torch.cat([one] * cp) for one in local.rows]), local.own, local.state
        del local

        def attn(*own: Tensor) -> tuple[tuple[Tensor], None]:
            return (layer.finish(own, state, lambda: arrived, positions),), None

        before, tracked.most = tracked.live_bytes(), 0
        graph, _ = run_detached(attn, *own, wgrads=DeferredWgrads())
        forward = tracked.most - before
        dy_TD = torch.ones_like(graph.take()[0])
        before, tracked.most = tracked.live_bytes(), 0
        graph.backward(dy_TD)
        return forward, tracked.most - before


@pytest.mark.parametrize(("a", "heads"), [(MLA, 4), (MLA, 16), (GQA, 16)], ids=["groups", "all heads", "gqa"])
def test_a_layer_allocates_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, a: MlaConfig | GqaConfig, heads: int
) -> None:
    """With a kernel of variable length, without its sums of the queries' gradients in FP32, which are its own.

    Planned is at least what is seen, and at most a quarter more.
    """
    cp, how = 8, Choice("varlen", saves_output=True)
    for module in (latent_context, gqa):
        monkeypatch.setattr(module, "chosen", lambda *_: how)
    for module in (latent_context, context_bytes):
        monkeypatch.setattr(module, "heads_at_once", lambda *_: heads)
    monkeypatch.setitem(core.BACKENDS, "varlen", varlen)
    at_once = heads if isinstance(a, MlaConfig) else a.num_heads
    of_kernel = 4 * at_once * (a.queries // a.num_heads + 1)
    for rank in (0, cp - 1):
        expected = S // cp * (context_work_bytes(a, BF16, cp, S) - of_kernel)
        forward, backward = peaks(a, BF16, cp, rank)
        assert 0.78 * expected <= max(forward, backward) <= expected
        kept = replace(BF16, recompute=frozenset[Recompute]())
        bound = S // cp * (context_work_bytes(a, kept, cp, S) - of_kernel)
        assert 0.5 * bound <= peaks(a, kept, cp, rank)[1] <= 1.05 * bound < expected


def test_whole_keys_of_heads_in_groups() -> None:
    """DeepSeek-V3's at 131,072 tokens, of 16 heads and of all, as docs/planning.md has them."""
    a, tokens = v3().model.attention, 131072
    assert isinstance(a, MlaConfig) and key_heads_at_once(a, FP8, tokens) == 16
    keys = [whole_keys_bytes(a, FP8, 32, heads) * tokens / 1e9 for heads in (16, 128)]
    by_hand = 2 * (16 * (448 + 320 * 65 / 64) + 3 * 576), 2 * (128 * (448 + 320 * 65 / 64) + 3 * 576)
    assert keys == pytest.approx([features * tokens / 1e9 for features in by_hand])
    assert [round(one, 1) for one in keys] == [3.7, 26.4]
    assert context_work_bytes(a, FP8, 1, tokens) == a.work_bytes(FP8) and context_message_bytes(a, FP8, 1) == 0


def test_more_ranks_a_sequence_hold_less_of_it() -> None:
    """Activations, dispatch and pipeline buffers fall with cp, whole keys stay."""
    config, found = v3("parallel.pp=16", "parallel.ep=8"), []
    for cp in (1, 2, 4, 8):  # as many sequences on their way as the pipeline holds
        one = replace(config, parallel=replace(config.parallel, cp=cp))
        worst = worst_rank(rank_memory(resolve(one, 16 * 8 * cp)))
        found.append(worst.kinds | worst.left_out)  # what of the work in turn is not the largest, too
    for before, after in pairwise(found):
        for kind in ("activations", "dispatch buffers", "pipeline buffers"):
            assert 0.45 * before[kind] < after[kind] < 0.6 * before[kind], kind
    workspace = [kinds["attention workspace"] for kinds in found]
    assert workspace[0] > 60e9 and min(workspace) > 5e9, "whole keys stay"
    assert found[0]["gather buffers"] == 0 < found[1]["gather buffers"]
