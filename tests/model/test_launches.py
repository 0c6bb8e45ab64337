"""What the attn phase of a block launches under FP8: each norm, cast and rotation once, nothing cast twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision
from tests.model.passes import BALANCE, build, positions, stream

PRODUCTS = ("gemm", "wgrad")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of the ops called, products apart."""
    names: Counter[str] = Counter()
    op = backend.op

    def counted(name: str) -> Callable[..., Any]:
        if name not in PRODUCTS:
            names[name] += 1
        return op(name)

    monkeypatch.setattr(backend, "op", counted)
    return names


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_the_attn_phase_launches_each_thing_once(layer: int, launched: Counter[str]) -> None:
    model = build(Precision.FP8, FULL_RECOMPUTE)
    x, dy = stream(model, seed=0)
    x.requires_grad_()
    launched.clear()
    attended = model.block(layer).attend(x, positions(model))
    cast_output = {"quantize_rows": 1, "pack_e5m6": 1}
    routing = {"route": 1} if layer else {}
    assert launched == Counter({"rms_norm": 4, "rope_queries": 1, "rope_keys": 1, **cast_output, **routing})

    launched.clear()
    outputs, grads = [attended.h_TD, attended.x.autograd_handle], [dy, dy]
    if attended.routed is not None:
        outputs += [attended.routed.topk_weights_TK, attended.routed.balance_loss]
        grads += [torch.ones_like(attended.routed.topk_weights_TK), torch.tensor(BALANCE)]
    torch.autograd.backward(outputs, grads)
    linears = {"quantize_rows_and_columns": 4, "rms_norm_columns": 3, "e5m6_to_columns": 1}
    heads = {"rope_queries": 1, "rope_keys": 1, "rope_queries_backward": 1, "rope_keys_backward": 1, "unpack_e5m6": 1}
    again = 2 + bool(layer)  # rows of both latents for the repeated up projections; y for the router
    back = {"route_backward": 1} if layer else {}
    assert launched == Counter({"rms_norm_backward": 4, "rms_norm": again, **linears, **heads, **back})
