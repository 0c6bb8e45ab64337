"""Phase by phase equals ordinary autograd to the bit: every precision and recomputation, in order and interleaved."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import Linear
from fp8moe.layers.moe import GroupedLinear, GroupedProducts
from fp8moe.layers.recipe import DEFAULT_RECOMPUTE, FULL_RECOMPUTE, Precision, Recompute
from fp8moe.layers.router import Router
from fp8moe.model.phases import BalanceLoss, pass_through
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.model.passes import (
    CHOICES,
    CONFIG,
    IDS,
    NOTHING,
    B,
    S,
    autograd,
    backward,
    build,
    equal,
    forward,
    grads,
    interleaved,
    loads,
    positions,
    start,
    step,
    stream,
    wgrads,
)
from tests.parallel.ranks import TIMEOUT, run_ranks

BLOCKS = {"dense": (0, {}), "moe": (1, {}), "unshared": (1, {"num_shared_experts": 0}), "unfused": (1, {"v_dim": 16})}
PHASES = {"dense": ("attn", "mlp"), "moe": ("attn", "dispatch", "mlp", "combine")}


def weight_gradient_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each Linear's weight gradient is computed from here on, by its id."""
    calls: Counter[int] = Counter()
    single, grouped = Linear.wgrad, GroupedProducts.wgrad

    def counted(self: Linear, *operands: Any) -> None:
        calls[id(self)] += 1
        single(self, *operands)

    def counted_groups(self: GroupedProducts, *operands: Any) -> None:
        calls[id(self.linear)] += 1
        grouped(self, *operands)

    monkeypatch.setattr(Linear, "wgrad", counted)
    monkeypatch.setattr(GroupedProducts, "wgrad", counted_groups)
    return calls


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("recompute", CHOICES, ids=IDS)
def test_phases_equal_autograd(
    precision: Precision, kind: str, recompute: frozenset[Recompute], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, changes = BLOCKS[kind]
    plain, model = (build(precision, names, **changes) for names in (NOTHING, recompute))
    x, dy = stream(plain, seed=0)
    expected = [*autograd(plain, layer, x, dy), *grads(plain), *loads(plain)]
    assert equal(expected, [*autograd(model, layer, x, dy), *grads(model), *loads(model)])
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.counts_E.zero_()

    calls = weight_gradient_calls(monkeypatch)
    block_pass = start(model, layer, x)
    assert tuple(phase.name for phase in block_pass.phases) == PHASES["moe" if layer else "dense"]
    assert {p.name for p in block_pass.phases if p.kind == "communication"} == {"dispatch", "combine"} & set(
        PHASES["moe"][: 4 * layer]
    )
    output, input_gradient = forward(block_pass), backward(block_pass, dy)
    assert not calls, "weight gradients wait"
    wgrads(block_pass)
    linears = [m for m in model.block(layer).modules() if isinstance(m, (Linear, GroupedLinear))]
    assert calls == {id(linear): 1 for linear in linears}, "each weight gradient is registered once"
    assert equal(expected, [output, input_gradient, *grads(model), *loads(model)])


def test_a_phases_weight_gradients_are_those_of_its_own_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Precision.BF16, DEFAULT_RECOMPUTE)
    x, dy = stream(model, seed=0)
    first, second = start(model, 1, x), start(model, 1, x * 2)
    for block_pass in (first, second):
        forward(block_pass)
        backward(block_pass, dy)
    calls = weight_gradient_calls(monkeypatch)
    block = model.block(1)
    attn, _, mlp, _ = first.phases
    for phase, modules in ((mlp, block.moe), (attn, block.attn)):
        assert phase.wgrad is not None and modules is not None
        phase.wgrad()
        assert calls == {id(m): 1 for m in modules.modules() if isinstance(m, (Linear, GroupedLinear))}
        calls.clear()
    got = grads(model)
    wgrads(second)
    others = grads(model)
    down = [name for name, _ in model.named_parameters()].index("blocks.1.moe.experts.down.weight")
    assert got[down].any() and others[down].any() and not torch.equal(got[down], others[down])


def test_the_balance_loss_is_told_once_in_the_forward_and_weighed_in_the_backward() -> None:
    model = build(Precision.FP32, NOTHING)
    x, dy = stream(model, seed=0)
    told: list[float] = []
    _, balance = model.block(1)(x, positions(model))
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        balance_loss = BalanceLoss(weight, lambda loss: told.append(loss.item()))
        block_pass = pass_through(model.block(1), lambda: x, positions(model), balance_loss)
        forward(block_pass)
        assert len(told) == 1 and told.pop() == balance.item()
        backward(block_pass, dy)
        wgrads(block_pass)
        assert not told
        gradients.append(
            dict(zip(dict(model.named_parameters()), grads(model), strict=True))["blocks.1.moe.router.weight"]
        )
    torch.testing.assert_close(gradients[2] - gradients[0], 3 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-6)
    assert (gradients[1] - gradients[0]).any()


def test_counts_leave_in_attn_and_rows_in_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = build(Precision.FP8, DEFAULT_RECOMPUTE), []
    for name in ("announce", "dispatch"):
        verb = getattr(LocalDispatcher, name)
        monkeypatch.setattr(LocalDispatcher, name, lambda *a, n=name, f=verb: (called.append(n), f(*a))[1])
    x, _ = stream(model, seed=0)
    attn, dispatch, *_ = start(model, 1, x).phases
    attn.forward()
    assert called == ["announce"]
    dispatch.forward()
    assert called == ["announce", "dispatch"]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_phases_out_of_order_are_refused(kind: str) -> None:
    model = build(Precision.FP32, NOTHING)
    layer, _ = BLOCKS[kind]
    x, dy = stream(model, seed=0)
    block_pass = start(model, layer, x)
    with pytest.raises(AssertionError, match="out of order"):
        block_pass.phases[1].forward()
    forward(block_pass)
    block_pass.backward_from(lambda: dy)
    with pytest.raises(AssertionError, match="out of order"):
        block_pass.phases[0].backward()


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("recompute", CHOICES, ids=IDS)
def test_an_interleaved_pair_equals_one_after_the_other(precision: Precision, recompute: frozenset[Recompute]) -> None:
    expected, _ = interleaved(build(precision, NOTHING))
    assert all(equal(expected, got) for got in interleaved(build(precision, recompute)))


def interleaved_on_ranks(precision: Precision, kind: str, chunks: int) -> bool:
    """The same pair with real messages beside the compute, every rank starting them in one order; and a whole step.

    With everything recomputed against one after the other with nothing.
    """
    mesh = build_mesh(1, 4, 4, timeout=TIMEOUT, ranks_per_node=2)
    found = []
    for recompute in (NOTHING, FULL_RECOMPUTE):
        dispatcher = make_dispatcher(kind, mesh, CONFIG.experts.num_experts, max_tokens=B * S, chunks=chunks)
        model = build(precision, recompute, dispatcher, mesh.ep_rank)
        pair, whole = interleaved(model), step(model)
        found.append([[*order, *whole] for order in pair])
    (expected, plain), both = found
    return all(equal(expected, got) for got in (plain, *both))


@pytest.mark.parametrize("precision, kind, chunks", [
    (Precision.FP8, "all_to_all", 1), (Precision.FP8, "node_limited", 2), (Precision.FP32, "node_limited", 1),
])  # fmt: skip
def test_the_pair_across_ranks(precision: Precision, kind: str, chunks: int) -> None:
    assert run_ranks(interleaved_on_ranks, 4, precision, kind, chunks) == [True] * 4
