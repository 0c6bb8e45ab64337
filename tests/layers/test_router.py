"""The router's products, its routing, counts, and the bias that balances loads: against loops and FP64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.live_memory import TrackStorages
from fp8moe.layers import router as of_router
from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import Recallable
from fp8moe.layers.router import (
    Router,
    RouterConfig,
    gate_dgrad,
    gate_wgrad,
    max_violation,
    split_bf16,
    update_bias,
    violations,
)
from tests.kernels.row_maps import record_waits

EXPERTS, DIM = 8, 32
SIGMOID = RouterConfig(topk=2, num_groups=4, top_groups=2, route_scale=2.5)
SOFTMAX = RouterConfig(topk=3, score="softmax", normalize_topk=False)
CHOSEN_SOFTMAX = RouterConfig(topk=3, score="softmax_topk", num_groups=4, top_groups=2, group_score="max")
CONFIGS = {"sigmoid": SIGMOID, "softmax": SOFTMAX, "softmax_topk": CHOSEN_SOFTMAX}


def build(config: RouterConfig, precision: Precision = Precision.FP32, dim: int = DIM) -> Router:
    torch.manual_seed(0)
    router = Router(dim, EXPERTS, config, Recipe(precision))
    torch.nn.init.normal_(router.weight, std=0.3)
    attach_main_grads(router)
    return router


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_come_from_unbiased_scores(config: RouterConfig) -> None:
    router = build(config)
    router.bias_E.uniform_(-2.0, -1.0)
    x = torch.randn(10, DIM)
    routing = router(x, num_sequences=2)
    logits = x @ router.weight.T
    scores = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1), "softmax_topk": logits.exp()}[config.score]
    for t in range(10):
        chosen = scores[t, routing.topk_ids_TK[t]]
        expected = chosen / chosen.sum() * config.route_scale if config.normalize_topk else chosen
        torch.testing.assert_close(routing.topk_weights_TK[t], expected)
        groups = set((routing.topk_ids_TK[t] // (8 // config.num_groups)).tolist())
        assert len(groups) <= config.top_groups


def test_counts_grow_in_training_forwards_only() -> None:
    router, x = build(SIGMOID), torch.randn(10, DIM)
    router.eval()
    router(x, 1)
    with torch.no_grad():
        router.train()
        router(x, 1)
    assert router.counts_E.sum() == 0
    first, second = router(x, 1), router(-x, 1)
    chosen = torch.cat([first.topk_ids_TK, second.topk_ids_TK])
    assert torch.equal(router.counts_E, torch.bincount(chosen.flatten(), minlength=EXPERTS))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_the_router_keeps_no_wide_copies_and_has_the_gradients_of_a_plain_product(precision: Precision) -> None:
    """On a CPU bit for bit those that autograd gives of widened operands; the weight's is not rounded."""
    tokens, dim = 48, 64
    router = build(SIGMOID, precision, dim)
    x = torch.randn(tokens, dim).to(precision.dtype).requires_grad_()
    with TrackStorages() as tracked:
        routing = router(x, 2)
    assert tracked.live_bytes() < tokens * dim * 2
    dy = torch.randn(tokens, 2)
    (dx,) = torch.autograd.grad(routing.topk_weights_TK, x, dy)

    wide = router.weight.detach().float().requires_grad_()
    scores = torch.nn.functional.linear(x.float(), wide).sigmoid().gather(1, routing.topk_ids_TK)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) * 2.5
    assert torch.equal(routing.topk_weights_TK, weights)
    expected = torch.autograd.grad(weights, (x, wide), dy)
    assert torch.equal(dx, expected[0]) and torch.equal(router.weight.main_grad, expected[1])  # type: ignore[arg-type]
    assert router.weight.grad is None


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_weights_gradient_is_not_rounded_on_its_way_to_main_grad(config: RouterConfig) -> None:
    router = build(config, Precision.BF16)
    x = torch.randn(40, DIM).bfloat16().requires_grad_()
    d_weights, d_loss = torch.randn(40, config.topk), torch.tensor(0.5)
    routing = router(x, 2)
    torch.autograd.backward((routing.topk_weights_TK, routing.balance_loss), (d_weights, d_loss))

    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, router.weight))
    logits, ids = exact_x @ exact_weight.T, routing.topk_ids_TK
    scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
    weights = (logits if config.score == "softmax_topk" else scores).gather(1, ids)
    if config.score == "softmax_topk":
        weights = weights.softmax(-1)
    elif config.normalize_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    shares = (scores / scores.sum(-1, keepdim=True)).view(2, 20, EXPERTS).mean(1)
    f = torch.zeros(40, EXPERTS).scatter_(1, ids, 1.0).view(2, 20, EXPERTS).mean(1) * (EXPERTS / config.topk)
    torch.autograd.backward((weights * config.route_scale, (f * shares).sum()), (d_weights.double(), d_loss.double()))
    assert exact_weight.grad is not None and exact_x.grad is not None and x.grad is not None
    assert relative(router.weight.main_grad, exact_weight.grad) < 1e-5  # type: ignore[arg-type]
    assert relative(x.grad, exact_x.grad) < 4e-3


def test_the_weights_gradient_waits_for_its_turn_and_recalls_x_once() -> None:
    router, wgrads, recalled = build(SIGMOID), DeferredWgrads(), []
    x = torch.randn(10, DIM)

    def recall() -> Tensor:
        recalled.append(1)
        return x

    for turn in (1, 2):
        routing = router(Recallable(x.detach().requires_grad_(), recall), 1)
        with wgrads.collect():
            routing.topk_weights_TK.sum().backward()
        assert len(wgrads) == 1 and len(recalled) == turn - 1
        before = router.weight.main_grad.clone()  # type: ignore[operator]
        wgrads.run()
        assert len(recalled) == turn and not torch.equal(before, router.weight.main_grad)  # type: ignore[arg-type]


def test_two_bf16_parts_multiply_as_the_fp32_gradient() -> None:
    """What a GPU does, on a CPU: one part alone misses the bound that the router is held to a hundredfold."""
    d_logits = torch.randn(96, EXPERTS) * torch.logspace(-8, 2, EXPERTS)
    x, weight = torch.randn(96, DIM).bfloat16(), torch.randn(EXPERTS, DIM).bfloat16()
    parts = split_bf16(d_logits)
    assert parts.shape == (2, 96, EXPERTS) and parts.dtype is torch.bfloat16
    assert ((parts.double().sum(0) - d_logits).abs() <= 2**-17 * d_logits.abs()).all()
    main_grad = torch.ones(EXPERTS, DIM)
    gate_wgrad(parts, x, main_grad)
    assert relative(main_grad - 1, d_logits.double().T @ x.double()) < 1e-5
    alone = torch.zeros(EXPERTS, DIM)
    gate_wgrad(parts[:1], x, alone)
    assert relative(alone, d_logits.double().T @ x.double()) > 1e-3
    wide = [gate_dgrad(d, weight) for d in (parts, d_logits[None])]
    assert wide[0].dtype is torch.bfloat16 and relative(wide[0], d_logits.double() @ weight.double()) < 2e-3
    assert (wide[0] != wide[1]).float().mean() < 0.02  # a last place here and there


class Launches(TorchDispatchMode):
    """The operators that work on a device: those that only allocate or look are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("empty", "new_empty", "empty_like", "detach", "device") and not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [64, 4096])
def test_launches_on_a_gpu_are_few_and_wait_for_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of tensor cores, counted with tensors that have no data."""
    monkeypatch.setattr(of_router, "on_tensor_cores", lambda operand: operand.dtype is torch.bfloat16)
    with torch.device("meta"):
        router = Router(DIM, EXPERTS, SIGMOID, Recipe(Precision.BF16))
        attach_main_grads(router)
        x, d_weights, d_loss = torch.empty(tokens, DIM, dtype=torch.bfloat16), torch.empty(tokens, 2), torch.empty(())
    x.requires_grad_()
    with Launches() as launches, record_waits() as waits:
        routing = router(x, 2)
        assert launches.names == ["mm", "route"]
        torch.autograd.backward((routing.topk_weights_TK, routing.balance_loss), (d_weights, d_loss))
    assert x.grad is not None and x.grad.dtype is torch.bfloat16 and waits == []
    expected = ["mm", "route", "route_backward", "copy_", "sub", "wgrad", "wgrad", "repeat", "mm"]
    assert sorted(launches.names) == sorted(expected), "eleven launches: route is three"


@pytest.mark.parametrize("loads, moves", [
    ([5, 3, 4, 4, 4, 4, 4, 4], [-0.5, 0.5, 0, 0, 0, 0, 0, 0]),
    # The mean is 4, the median 1: experts with 2 and 3 are above the one and below the other.
    ([22, 1, 1, 1, 1, 1, 2, 3], [-0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    # The mean is 6, the median 8: those with 7 are above the mean and below the median.
    ([8, 8, 8, 8, 7, 7, 1, 1], [-0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5]),
])  # fmt: skip
def test_bias_moves_towards_the_mean_load_and_counts_start_anew(loads: list[int], moves: list[float]) -> None:
    router = build(SIGMOID)
    router.bias_E.fill_(1.0)
    router.counts_E.copy_(torch.tensor(loads))
    update_bias(router, gamma=0.5)
    assert (router.bias_E - 1.0).tolist() == moves
    assert not router.counts_E.any()


def test_choice_is_by_biased_scores_and_forced_balance_goes_round() -> None:
    router = build(replace(SIGMOID, num_groups=1, top_groups=1))
    router.bias_E[3] = 5.0
    x = torch.randn(16, DIM)
    others = x @ router.weight.T
    others[:, 3] = -torch.inf
    expected = torch.stack([torch.full((16,), 3), others.argmax(-1)], -1)
    assert torch.equal(router(x, 1).topk_ids_TK, expected)
    forced = build(replace(SIGMOID, topk=3, force_balance=True))
    assert forced(x[:4], 1).topk_ids_TK.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]


@pytest.mark.parametrize("change, words", [
    *(({name: 0}, rf"^model\.router\.{name}=0 must be at least 1: use 1 or more$")
      for name in ("topk", "num_groups", "top_groups")),
    ({"score": "tanh"}, r"model\.router\.score='tanh' does not exist: use sigmoid, softmax or softmax_topk$"),
    ({"group_score": "sum"}, r"model\.router\.group_score='sum' does not exist: use top2_sum or max$"),
    ({"score": "softmax_topk", "normalize_topk": False}, r"normalize_topk=false contradicts score=softmax_topk"),
    ({"top_groups": 5}, r"model\.router\.top_groups=5 exceeds num_groups=4: use at most 4"),
])  # fmt: skip
def test_impossible_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SIGMOID, **change)


@pytest.mark.parametrize("change, experts, words", [
    ({}, 10, r"model\.router\.num_groups=4 does not divide num_experts=10: use 2"),
    ({"num_groups": 3}, 8, r"model\.router\.num_groups=3 does not divide num_experts=8: use 2"),
    ({"topk": 5}, 8, r"model\.router\.topk=5 exceeds the 4 experts of top_groups=2 groups: use at most 4"),
])  # fmt: skip
def test_a_number_of_experts_that_does_not_fit_is_refused(change: dict[str, Any], experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SIGMOID, **change).check(experts)
    replace(SIGMOID, topk=4).check(8)


def test_a_batch_without_tokens_has_no_loss() -> None:
    routing = build(SIGMOID)(torch.zeros(0, DIM, requires_grad=True), 1)
    assert routing.balance_loss == 0 and routing.topk_ids_TK.shape == (0, 2)
    routing.balance_loss.backward()


def test_max_violation() -> None:
    assert max_violation(torch.tensor([2, 2, 2])) == 0
    assert max_violation(torch.tensor([6, 0, 0])) == 2
    assert max_violation(torch.zeros(3)) == 0
    loads = torch.tensor([[2, 2, 2], [6, 0, 0], [0, 0, 0], [2**24 + 1, 0, 0]])
    with record_waits() as waits:
        of_layers = violations(loads)
    assert waits == [] and of_layers.tolist() == [0, 2, 0, 2]


def test_loads_are_counted_exactly_however_many() -> None:
    router = build(SIGMOID)
    router.counts_E += 2**24 + 1  # the first number that FP32 does not hold
    routing = router(torch.randn(10, DIM), num_sequences=1)
    loads = routing.topk_ids_TK.flatten().tolist()
    assert router.counts_E.tolist() == [2**24 + 1 + loads.count(expert) for expert in range(EXPERTS)]
