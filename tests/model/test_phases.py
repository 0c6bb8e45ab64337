"""Phase by phase equals ordinary autograd to the bit, in every precision, in order and interleaved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.layers.attention.mla import Positions
from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.recipe import Precision
from fp8moe.layers.wgrad import DeferredWgrads
from fp8moe.model.block import Block
from fp8moe.model.phases import BalanceLoss, DensePass, MoePass, pass_through
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.model.hf_oracle import BASE
from tests.parallel.ranks import TIMEOUT, run_ranks

B, S, BALANCE = 2, 24, 0.25
CONFIG = replace(BASE, num_layers=2, num_dense_layers=1)
F_ORDER = {"dense": ("attn", "mlp"), "moe": ("attn", "dispatch", "mlp", "combine")}
# The start order of an overlapped pair: a backward's and a forward's phases, each in its own order, mixed.
PAIR = ("B combine", "F attn", "F dispatch", "B mlp", "B dispatch", "W mlp", "F mlp", "F combine", "B attn", "W attn")


def build(precision: Precision, shared: int = 1, dispatcher: Dispatcher | None = None, ep_rank: int = 0) -> Transformer:
    config = replace(CONFIG, num_shared_experts=shared)
    dispatcher = dispatcher or LocalDispatcher(config.num_experts)
    model = Transformer(config, precision=precision, dispatcher=dispatcher)
    init_weights(model, seed=3, ep_rank=ep_rank)
    return model


def stream(model: Transformer, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, B * S, CONFIG.dim, generator=generator).to(model.precision.dtype)
    return x, dy


def autograd(model: Transformer, layer: int, x: Tensor, dy: Tensor) -> list[Tensor]:
    positions = model.positions(torch.arange(S).expand(B, -1))
    x = x.clone().requires_grad_()
    y, balance = model.blocks[str(layer)](x, positions)
    torch.autograd.backward([y, balance], [dy, torch.tensor(BALANCE)]) if balance.requires_grad else y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


def grads(model: Transformer) -> list[Tensor]:
    out = [p.main_grad.clone() for p in model.parameters()]
    model.main_grads.zero_()
    return out


def start(model: Transformer, layer: int, x: Tensor, store: DeferredWgrads, key: int) -> DensePass | MoePass:
    positions = model.positions(torch.arange(S).expand(B, -1))
    return start_at(model.block(layer), x, positions, store, key)


def start_at(block: Block, x: Tensor, positions: Positions, store: DeferredWgrads, key: int) -> DensePass | MoePass:
    return pass_through(block, lambda: x, positions, BalanceLoss(BALANCE, lambda loss: None), store=store, key=key)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("layer, shared", [(0, 1), (1, 1), (1, 0)])
def test_phases_equal_autograd(precision: Precision, layer: int, shared: int) -> None:
    model = build(precision, shared)
    x, dy = stream(model, seed=0)
    expected = autograd(model, layer, x, dy) + grads(model)

    store = DeferredWgrads()
    run = start(model, layer, x, store, key=0)
    assert tuple(phase.name for phase in run.phases) == F_ORDER["dense" if layer == 0 else "moe"]
    for phase in run.phases:
        phase.forward()
    output = run.output
    run.backward_from(lambda: dy)
    for phase in reversed(run.phases):
        phase.backward()
    early = grads(model)
    linears = [
        i for i, (name, _) in enumerate(model.named_parameters()) if f"blocks.{layer}." in name and "down" in name
    ]
    assert linears and all(not early[i].any() for i in linears), "weight gradients must wait"
    for phase in run.phases:
        if phase.wgrad:
            phase.wgrad()
    assert len(store) == 0
    late = [a + b for a, b in zip(early, grads(model), strict=True)]
    got = [output, run.input_gradient, *late]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_counts_leave_in_attn_and_rows_in_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = build(Precision.FP8), []
    for name in ("announce", "dispatch"):
        verb = getattr(LocalDispatcher, name)
        monkeypatch.setattr(LocalDispatcher, name, lambda *a, n=name, f=verb: (called.append(n), f(*a))[1])
    x, _ = stream(model, seed=0)
    attn, dispatch, *_ = start(model, 1, x, DeferredWgrads(), key=0).phases
    attn.forward()
    assert called == ["announce"]
    dispatch.forward()
    assert called == ["announce", "dispatch"]


@pytest.mark.parametrize("precision", list(Precision))
def test_interleaved_pair_equals_one_after_the_other(precision: Precision) -> None:
    expected, got = interleaved(build(precision))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def interleaved_on_ranks(precision: Precision, kind: str, chunks: int) -> bool:
    """The same pair with real messages under way beside the compute; every rank starts them in one order."""
    mesh = build_mesh(1, 4, 4, timeout=TIMEOUT, ranks_per_node=2)
    dispatcher = make_dispatcher(kind, mesh, CONFIG.num_experts, max_tokens=B * S, chunks=chunks)
    expected, got = interleaved(build(precision, 1, dispatcher, mesh.ep_rank))
    return all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("precision, kind, chunks", [
    (Precision.FP8, "all_to_all", 1), (Precision.FP8, "node_limited", 2), (Precision.FP32, "node_limited", 1),
])  # fmt: skip
def test_the_pair_across_ranks(precision: Precision, kind: str, chunks: int) -> None:
    assert run_ranks(interleaved_on_ranks, 4, precision, kind, chunks) == [True] * 4


def interleaved(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """Two micro-batches one after the other under autograd, and as an overlapped pair: outputs and gradients."""
    (x0, dy0), (x1, dy1) = stream(model, 0), stream(model, 1)
    first, second = autograd(model, 1, x0, dy0), autograd(model, 1, x1, dy1)
    expected = [*first, *second, *grads(model)]

    store = DeferredWgrads()
    old = start(model, 1, x0, store, key=0)
    for phase in old.phases:
        phase.forward()
    y0 = old.output
    old.backward_from(lambda: dy0)
    new = start(model, 1, x1, store, key=1)
    by_name = {"F": {p.name: p.forward for p in new.phases}, "B": {p.name: p.backward for p in old.phases},
               "W": {p.name: p.wgrad for p in old.phases}}  # fmt: skip
    for step in PAIR:
        direction, name = step.split()
        action = by_name[direction][name]
        assert action is not None
        action()
    y1 = new.output
    new.backward_from(lambda: dy1)
    for phase in reversed(new.phases):
        phase.backward()
        if phase.wgrad:
            phase.wgrad()
    return expected, [y0, old.input_gradient, y1, new.input_gradient, *grads(model)]
