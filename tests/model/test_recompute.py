"""Recomputation in the model: bits as without it, nothing registered or counted twice, and memory really let go."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.kept import Made
from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.experts import GroupedLinear, GroupedProducts
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Precision
from fp8moe.layers.recompute import RECIPE, Recallable, Recompute
from fp8moe.layers.router import Router
from fp8moe.layers.wgrad import DeferredWgrads
from fp8moe.model.memory import MicroBatch, stage_activation_bytes
from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.model import test_phases
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE
from tests.model.test_phases import BALANCE, B, S, autograd, grads, interleaved, start, stream
from tests.parallel.ranks import TIMEOUT, run_ranks

NOTHING: frozenset[Recompute] = frozenset()
CHOICES = [*(frozenset({name}) for name in Recompute), RECIPE]
IDS = ["norm", "mla_up", "swiglu", "all"]
# Heads of equal size: PyTorch's fused attention on a CPU, which saves q, k and v themselves.
CONFIG = replace(test_phases.CONFIG, v_dim=BASE.nope_dim + BASE.rope_dim, mtp_depth=1)


def build(
    precision: Precision, recompute: frozenset[Recompute], dispatcher: Dispatcher | None = None, ep_rank: int = 0,
    **changes: Any,
) -> Transformer:  # fmt: skip
    config = replace(CONFIG, **changes)
    dispatcher = dispatcher or LocalDispatcher(config.num_experts)
    model = Transformer(config, precision=precision, dispatcher=dispatcher, recompute=recompute)
    init_weights(model, seed=3, ep_rank=ep_rank)
    return model


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counts(model: Transformer) -> list[Tensor]:
    return [module.counts_E.clone() for module in model.modules() if isinstance(module, Router)]


def step(model: Transformer) -> list[Tensor]:
    """One micro-batch of the whole model, MTP included: loss sums, every main_grad, every count."""
    sums = model(tokens(CONFIG.vocab_size, B, S))
    (sums.main + 0.3 * sums.mtp + BALANCE * sums.balance).backward()
    return [sums.main.detach(), sums.mtp.detach(), sums.balance.detach(), *grads(model), *counts(model)]


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0}, {"v_dim": 16}], ids=["", "no query latent", "unfused"])
def test_the_whole_model_is_bit_equal(precision: Precision, changes: dict[str, int]) -> None:
    expected = step(build(precision, NOTHING, **changes))
    assert expected[-1].sum() == B * S * CONFIG.topk, "a micro-batch is counted once"
    for recompute in CHOICES:
        assert equal(expected, step(build(precision, recompute, **changes))), recompute


@pytest.mark.parametrize("recompute", [NOTHING, RECIPE], ids=["nothing", "all"])
def test_the_joined_norms_of_mtp_come_back_in_their_order(recompute: frozenset[Recompute]) -> None:
    model = build(Precision.FP32, recompute)
    assert model.mtp is not None
    torch.manual_seed(0)
    hidden, embedded, dy = torch.randn(3, B * S, CONFIG.dim)
    model.mtp.enter(hidden, embedded).backward(dy)
    normed = [torch.nn.functional.rms_norm(x, x.shape[1:], eps=CONFIG.norm_eps) for x in (hidden, embedded)]
    torch.testing.assert_close(model.mtp.join.weight.main_grad, dy.T @ torch.cat(normed, dim=-1))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize("recompute", CHOICES, ids=IDS)
def test_blocks_are_bit_equal_phase_by_phase(
    precision: Precision, layer: int, recompute: frozenset[Recompute], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = build(precision, NOTHING), build(precision, recompute)
    x, dy = stream(plain, seed=0)
    expected = [*autograd(plain, layer, x, dy), *grads(plain), *counts(plain)]
    assert equal(expected, [*autograd(model, layer, x, dy), *grads(model), *counts(model)])
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.counts_E.zero_()

    calls = weight_gradient_calls(monkeypatch)
    store = DeferredWgrads()
    run = start(model, layer, x, store, key=0)
    for phase in run.phases:
        phase.forward()
    output = run.output
    run.backward_from(lambda: dy)
    for phase in reversed(run.phases):
        phase.backward()
    assert not calls, "weight gradients wait"
    for phase in run.phases:
        if phase.wgrad:
            phase.wgrad()
    assert len(store) == 0
    linears = [m for m in model.blocks[str(layer)].modules() if isinstance(m, (Linear, GroupedLinear))]
    assert calls == {id(linear): 1 for linear in linears}, "each weight gradient is registered once"
    assert equal(expected, [output, run.input_gradient, *grads(model), *counts(model)])


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
@pytest.mark.parametrize("recompute", CHOICES, ids=IDS)
def test_an_interleaved_pair_is_bit_equal(precision: Precision, recompute: frozenset[Recompute]) -> None:
    expected, _ = interleaved(build(precision, NOTHING))
    assert all(equal(expected, got) for got in interleaved(build(precision, recompute)))


def pair_on_ranks(precision: Precision) -> bool:
    """Two processes, ep=2: the pair with everything recomputed against one after the other with nothing."""
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    found = []
    for recompute in (NOTHING, RECIPE):
        dispatcher = make_dispatcher("all_to_all", mesh, CONFIG.num_experts, max_tokens=B * S)
        model = build(precision, recompute, dispatcher, mesh.ep_rank)
        pair, whole = interleaved(model), step(model)
        found.append([[*way, *whole] for way in pair])
    (expected, _), both = found
    return all(equal(expected, got) for got in both)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP8])
def test_the_pair_across_ranks(precision: Precision) -> None:
    assert run_ranks(pair_on_ranks, 2, precision) == [True] * 2


@pytest.mark.parametrize("recompute, times", [(NOTHING, 1), (RECIPE, 2)], ids=["off", "on"])
def test_only_the_up_projections_run_again(
    recompute: frozenset[Recompute], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(Precision.FP8, recompute)
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.blocks["1"].named_modules()}
    products: Counter[str] = Counter()
    fprop, choose, attention = Linear.fprop, Router.choose, model.blocks["1"].attn.attend

    def counted(self: Linear, x: Any) -> Tensor:
        products[names[id(self)]] += 1
        return fprop(self, x)

    def chosen(self: Router, scores: Tensor) -> Tensor:
        products["choose"] += 1
        return choose(self, scores)

    def attended(*inputs: Any) -> Tensor:
        products["attend"] += 1
        return attention(*inputs)

    monkeypatch.setattr(Linear, "fprop", counted)
    monkeypatch.setattr(Router, "choose", chosen)
    model.blocks["1"].attn.attend = attended
    autograd(model, 1, *stream(model, seed=0))
    once = {"qkv_a": 1, "o": 1, "gate_up": 1, "down": 1, "choose": 1, "attend": 1}
    assert products == once | {"q_b": times, "kv_b": times}


def forward(model: Transformer, layer: int, x: Tensor, phases: bool) -> Any:
    """A block's forward by autograd or phase by phase; what must live on until the backward."""
    if not phases:
        return model.blocks[str(layer)](x, model.positions(torch.arange(S).expand(B, -1)))
    run = start(model, layer, x, DeferredWgrads(), key=0)
    for phase in run.phases:
        phase.forward()
    return run, run.output


@pytest.mark.parametrize("phases", [False, True], ids=["autograd", "phases"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("recompute", [NOTHING, *CHOICES], ids=["nothing", *IDS])
def test_norm_outputs_and_heads_die_with_the_forward(
    precision: Precision, recompute: frozenset[Recompute], phases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(precision, recompute)
    seen: dict[str, list[StorageWeakRef]] = {"norm": [], "mla_up": []}
    norm, attend = RMSNorm.forward, model.blocks["1"].attn.attend

    def watched(self: RMSNorm, x: Tensor) -> Recallable:
        y = norm(self, x)
        seen["norm"].append(StorageWeakRef(y.tensor.untyped_storage()))
        return y

    def attended(*inputs: Any) -> Tensor:
        seen["mla_up"] += [StorageWeakRef(t.untyped_storage()) for t in inputs[:3]]
        return attend(*inputs)

    monkeypatch.setattr(RMSNorm, "forward", watched)
    model.blocks["1"].attn.attend = attended
    x = stream(model, seed=0)[0].requires_grad_()
    alive = forward(model, 1, x, phases)
    assert len(seen["norm"]) == 4 and len(seen["mla_up"]) == 3
    for name, refs in seen.items():
        assert {ref.expired() for ref in refs} == {Recompute(name) in recompute}, name
    del alive


SMALL = replace(CONFIG, dim=128, expert_hidden=64, dense_hidden=128, topk=4, force_balance=True, max_seq_len=256)
NORM_ON = [RECIPE, frozenset({Recompute.NORM})]


@pytest.mark.parametrize("phases", [False, True], ids=["autograd", "phases"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_the_estimate_is_what_is_kept(precision: Precision, layer: int, phases: bool) -> None:
    """Bytes alive after a block's forward against `stage_activation_bytes`: within 1 %.

    256 tokens fall on 8 experts evenly, in groups of 128, so that no row is padding. The block's output is counted in
    the place of its input, which is the caller's. Without `norm` PyTorch's norm on a CPU keeps more than a GPU's does.
    """
    num_tokens = 256
    stage = Stage(0, layer, layer + 1, embedding=False, head=False, mtp=False)
    measured = {}
    for recompute in (NOTHING, *CHOICES):
        model = Transformer(SMALL, precision=precision, dispatcher=LocalDispatcher(8), recompute=recompute)
        init_weights(model, seed=3)
        positions = model.positions(torch.arange(num_tokens)[None])
        x = torch.randn(num_tokens, SMALL.dim).to(precision.dtype).requires_grad_()
        with Made() as made:
            if phases:
                run = test_phases.start_at(model.block(layer), x, positions, DeferredWgrads(), key=0)
                for phase in run.phases:
                    phase.forward()
                alive: Any = (run, run.output)
            else:
                alive = model.blocks[str(layer)](x, positions)
        measured[recompute] = made.alive()
        estimate = stage_activation_bytes(SMALL, stage, MicroBatch(1, num_tokens, precision.value, recompute))
        if Recompute.NORM in recompute:
            assert measured[recompute] == pytest.approx(estimate, rel=0.01), recompute
        else:
            assert measured[recompute] > 0.99 * estimate, recompute
        del alive
    assert measured[RECIPE] < min(kept for names, kept in measured.items() if names != RECIPE)
