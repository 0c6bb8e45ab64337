"""GPT-OSS's mixture of experts: clamped, with biases of experts and of the gate, against a loop in FP64 under autograd.

Sizes are multiples of 16 and not of 128, as the released 2880 is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import attach_main_grads, decays, is_expert, quantize_weights
from fp8moe.layers.moe import ExpertsConfig, MoE
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import capture_saved
from fp8moe.layers.router import RouterConfig
from tests.distance import calc_diff

D, F, T, E, LIMIT = 80, 144, 96, 5, 2.5
ROUTER = RouterConfig(topk=2, score="softmax_topk", gate_bias=True, aux_loss_alpha=0.0)
EXPERTS = ExpertsConfig(E, F, num_shared=0, activation="swiglu_clamped", swiglu_limit=LIMIT, bias=True)
BOUND = {Precision.FP32: 1e-10, Precision.BF16: 2e-4, Precision.FP8: 4e-3}


def build(precision: Precision, experts: ExpertsConfig = EXPERTS, recompute: frozenset[str] = frozenset()) -> MoE:
    torch.manual_seed(0)
    moe = MoE(D, ROUTER, experts, Recipe(precision, recompute), LocalDispatcher(E))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.2)
    attach_main_grads(moe)
    quantize_weights(moe)
    return moe


def released(moe: MoE, x: Tensor, ids: Tensor, p: dict[str, Tensor], limit: float | None) -> Tensor:
    """FP64: each token through its experts, biases added before the routing weight multiplies."""
    logits = x @ p["router.weight"].T + p["router.gate_bias"]
    weights = logits.gather(1, ids).softmax(-1)
    rows = []
    for t in range(len(x)):
        total = torch.zeros(D, dtype=torch.float64)
        for k, e in enumerate(ids[t].tolist()):
            gate, up = (x[t] @ p["experts.gate_up.weight"][e].T + p["experts.gate_up_bias"][e]).chunk(2)
            if limit is None:
                h = torch.nn.functional.silu(gate) * up
            else:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            total = total + weights[t, k] * (h @ p["experts.down.weight"][e].T + p["experts.down_bias"][e])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("precision", list(Precision))
def test_output_and_all_gradients(precision: Precision, limit: float | None) -> None:
    moe = build(precision, replace(EXPERTS, activation="swiglu" if limit is None else "swiglu_clamped"))
    x = torch.randn(T, D).to(precision.dtype).requires_grad_()
    dy = torch.randn(T, D).to(precision.dtype) * 2**-34
    routed = moe.route(x, 2)
    y, ids = moe(routed), routed.announced.topk_ids_TK
    y.backward(dy)
    p = {name: w.detach().double().requires_grad_() for name, w in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    expected = released(moe, x64, ids, p, limit)
    expected.backward(dy.double())
    # A value that its cast moved over the limit has another gradient: a clamp is no smooth function.
    bound = BOUND[precision] * (8 if limit and precision is not Precision.FP32 else 1)
    assert calc_diff(y.detach(), expected.detach()) <= bound
    assert calc_diff(x.grad, x64.grad) <= bound
    for name, parameter in moe.named_parameters():
        if name == "router.gate_bias" and precision is not Precision.FP32:
            continue  # a sum over tokens that nearly cancels, of gradients with BF16's noise
        assert calc_diff(parameter.main_grad, p[name].grad) <= 2 * bound, name  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", list(Precision))
def test_biases_wait_with_the_weights_and_experts_without_rows_are_left(precision: Precision) -> None:
    moe = build(precision)
    assert moe.router.gate_bias is not None
    moe.router.gate_bias.data[3] = -100.0  # nobody goes there
    for parameter in moe.parameters():
        parameter.main_grad.fill_(0.5)  # type: ignore[operator]
    x, wgrads = torch.randn(T, D).to(precision.dtype), DeferredWgrads()
    y = moe(moe.route(x, 1))
    with wgrads.collect():
        y.sum().backward()
    assert all(bool((p.main_grad == 0.5).all()) for p in moe.parameters())  # type: ignore[operator]
    wgrads.run()
    for name in ("gate_up_bias", "down_bias"):
        touched = (getattr(moe.experts, name).main_grad != 0.5).any(1)
        assert touched.tolist() == [e != 3 for e in range(E)], name


def test_recomputation_changes_no_bit() -> None:
    found = []
    for names in (frozenset(), frozenset({"swiglu"})):
        moe, x = build(Precision.BF16, recompute=names), torch.ones(T, D).bfloat16().cumsum(0).sin().requires_grad_()
        with capture_saved():
            moe(moe.route(x, 1)).sum().backward()
        found.append([x.grad, *(p.main_grad for p in moe.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]


def test_parameters_are_counted_marked_and_not_decayed() -> None:
    moe = build(Precision.FP32)
    parameters = dict(moe.named_parameters())
    gate = [parameters.pop(name) for name in ("router.weight", "router.gate_bias")]
    assert [tuple(p.shape) for p in gate] == [(E, D), (E,)]
    assert sum(p.numel() for p in parameters.values()) == EXPERTS.num_parameters(D, E)
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if name.endswith("bias")}
    assert shapes == {"experts.gate_up_bias": (E, 2 * F), "experts.down_bias": (E, D)}
    assert all(is_expert(p) for p in parameters.values())
    decayed = {name for name, p in moe.named_parameters() if decays(p)}
    assert decayed == {"router.weight", "experts.gate_up.weight", "experts.down.weight"}
    starts = {name: getattr(p, "initial_value", None) for name, p in moe.named_parameters()}
    assert {name for name, value in starts.items() if value == 0.0} == {
        "router.gate_bias", "experts.gate_up_bias", "experts.down_bias",
    }  # fmt: skip


@pytest.mark.parametrize(("n", "k"), [(80, 144), (144, 2880), (2880, 80)])
def test_grouped_products_take_sizes_that_are_no_multiple_of_128(n: int, k: int) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 128, 128, 256], dtype=torch.int32)
    x, dy, w = torch.randn(256, k).bfloat16(), torch.randn(256, n).bfloat16(), torch.randn(3, n, k).bfloat16()
    rows, (blocks, transposed) = quantize_rows(x), quantize_blocks(w)
    dense, by_rows = blocks.dequantize().double(), rows.dequantize().double()
    y = grouped_gemm(rows, blocks, offsets)
    assert calc_diff(y, torch.cat([by_rows[:128] @ dense[0].T, by_rows[128:] @ dense[2].T])) <= 5e-6
    back, seen = grouped_gemm(quantize_rows(dy), transposed, offsets), quantize_rows(dy).dequantize().double()
    assert calc_diff(back, torch.cat([seen[:128] @ dense[0], seen[128:] @ dense[2]])) <= 5e-6
    main_grad, columns = torch.zeros(3, n, k), [quantize_columns(t) for t in (dy, x)]
    grouped_wgrad(*columns, offsets, main_grad)
    left, right = (c.dequantize().double() for c in columns)
    expected = torch.stack([left[:, :128] @ right[:, :128].T, torch.zeros(n, k), left[:, 128:] @ right[:, 128:].T])
    assert calc_diff(main_grad, expected) <= 1e-12
