"""Recomputation in the model: bits as without it, nothing registered or counted twice, and memory really let go."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fp8moe.kernels.route import route
from fp8moe.layers.attention import core
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import Normed
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recompute
from fp8moe.model.transformer import Transformer
from tests.model import passes
from tests.model.passes import (
    CHOICES,
    CONFIG,
    IDS,
    NOTHING,
    B,
    S,
    autograd,
    build,
    equal,
    positions,
    start,
    step,
    stream,
)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0}, {"v_dim": 16}], ids=["", "no query latent", "unfused"])
def test_the_whole_model_is_bit_equal(precision: Precision, changes: dict[str, int]) -> None:
    expected = step(build(precision, NOTHING, **changes))
    assert expected[-1].sum() == B * S * CONFIG.router.topk, "a micro-batch is counted once"
    for recompute in CHOICES:
        assert equal(expected, step(build(precision, recompute, **changes))), recompute


@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["nothing", "all"])
def test_the_joined_norms_of_mtp_come_back_in_their_order(recompute: frozenset[Recompute]) -> None:
    model = build(Precision.FP32, recompute)
    assert model.mtp is not None
    torch.manual_seed(0)
    hidden, embedded, dy = torch.randn(3, B * S, CONFIG.dim)
    model.mtp.enter(hidden, embedded).backward(dy)
    normed = [torch.nn.functional.rms_norm(x, x.shape[1:], eps=CONFIG.norm_eps) for x in (embedded, hidden)]
    torch.testing.assert_close(model.mtp.join.weight.main_grad, dy.T @ torch.cat(normed, dim=-1))


@pytest.mark.parametrize("recompute, times", [(NOTHING, 1), (FULL_RECOMPUTE, 2)], ids=["off", "on"])
def test_only_the_up_projections_run_again(
    recompute: frozenset[Recompute], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(Precision.FP8, recompute)
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.block(1).named_modules()}
    products: Counter[str] = Counter()
    fprop, choose, attention = Linear.fprop, route, core.BACKENDS["sdpa"]

    def counted(self: Linear, x: Any) -> Tensor:
        products[names[id(self)]] += 1
        return fprop(self, x)

    def chosen(*inputs: Any, **options: Any) -> Any:
        products["choose"] += 1
        return choose(*inputs, **options)

    def attended(*inputs: Any) -> Tensor:
        products["attend"] += 1
        return attention(*inputs)

    monkeypatch.setattr(Linear, "fprop", counted)
    monkeypatch.setattr("fp8moe.layers.router.route", chosen)
    monkeypatch.setitem(core.BACKENDS, "sdpa", attended)
    autograd(model, 1, *stream(model, seed=0))
    once = {"qkv_a": 1, "o": 1, "gate_up": 1, "down": 1, "choose": 1, "attend": 1}
    assert products == once | {"q_b": times, "kv_b": times}


def forward(model: Transformer, layer: int, x: Tensor, phases: bool) -> Any:
    """A block's forward by autograd or phase by phase; what must live on until the backward."""
    if not phases:
        return model.block(layer)(x, positions(model))
    block_pass = start(model, layer, x)
    return block_pass, passes.forward(block_pass)


@pytest.mark.parametrize("phases", [False, True], ids=["autograd", "phases"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("recompute", [NOTHING, *CHOICES], ids=["nothing", *IDS])
def test_norm_outputs_and_heads_die_with_the_forward(
    precision: Precision, recompute: frozenset[Recompute], phases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(precision, recompute)
    seen: dict[str, list[StorageWeakRef]] = {"norm": [], "mla_up": []}
    placeholders: list[torch.Size] = []
    norm, attend = RMSNorm._norm, core.BACKENDS["sdpa"]

    def watched(self: RMSNorm, *inputs: Any, **options: Any) -> tuple[Tensor, Normed]:
        h, y = norm(self, *inputs, **options)
        kept = y.tensor.untyped_storage()
        if kept.nbytes() > y.tensor.element_size():
            seen["norm"].append(StorageWeakRef(kept))
        else:  # a placeholder: all share one NaN, which lives on
            placeholders.append(y.tensor.shape)
        return h, y

    def attended(*inputs: Any) -> Tensor:
        seen["mla_up"] += [StorageWeakRef(t.untyped_storage()) for t in inputs[:3]]
        return attend(*inputs)

    monkeypatch.setattr(RMSNorm, "_norm", watched)
    monkeypatch.setitem(core.BACKENDS, "sdpa", attended)
    x = stream(model, seed=0)[0].requires_grad_()
    alive = forward(model, 1, x, phases)
    assert len(seen["norm"]) + len(placeholders) == 4 and len(seen["mla_up"]) == 3
    assert Recompute.NORM in recompute or not placeholders
    for name, refs in seen.items():
        assert all(ref.expired() == (Recompute(name) in recompute) for ref in refs), name
    del alive
