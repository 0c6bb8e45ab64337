"""Given experts: the router's own choice, given to it, changes no bit; another's is FP64 autograd of the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.route import route
from fp8moe.layers.linear import attach_main_grads, main_grad_of
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig, Routing
from tests.kernels.row_maps import record_waits
from tests.layers.test_router import CONFIGS, DIM, EXPERTS, SIGMOID, SOFTMAX

TOKENS, SEQUENCES = 40, 2
FREE = CONFIGS | {f"{name}, gate bias": replace(config, gate_bias=True) for name, config in CONFIGS.items()}
ALL = FREE | {"forced balance": replace(SIGMOID, force_balance=True)}


def build(config: RouterConfig) -> Router:
    torch.manual_seed(0)
    router = Router(DIM, EXPERTS, config, Recipe(Precision.FP32))
    torch.nn.init.normal_(router.weight, std=0.3)
    router.bias_E.normal_(std=0.5)
    if router.gate_bias is not None:
        torch.nn.init.normal_(router.gate_bias, std=0.5)
    attach_main_grads(router)
    return router


def gradients(router: Router, x: Tensor, routing: Routing) -> list[Tensor]:
    """Of x, the weight, and the gate's bias where there is one, by fixed gradients of what the router gives."""
    router.zero_grad()
    main_grad_of(router.weight).zero_()
    d_weights = torch.randn(routing.topk_weights_TK.shape, generator=torch.Generator().manual_seed(1))
    given = (routing.topk_weights_TK, routing.balance_loss), (d_weights, torch.tensor(0.7))
    (dx,) = torch.autograd.grad(given[0], x, given[1])
    found = [dx, main_grad_of(router.weight).clone()]
    if router.gate_bias is not None:
        found.append(main_grad_of(router.gate_bias).clone())
        main_grad_of(router.gate_bias).zero_()
    return found


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_its_own_choice_changes_no_bit(config: RouterConfig) -> None:
    router, x = build(config), torch.randn(TOKENS, DIM, requires_grad=True)
    own = router(x, SEQUENCES)
    counts, of_own = router.counts_E.clone(), gradients(router, x, own)
    router.counts_E.zero_()
    given = router(x, SEQUENCES, None, own.topk_ids_TK.to(torch.uint8))
    for name in ("topk_ids_TK", "topk_weights_TK", "balance_loss"):
        assert torch.equal(getattr(given, name), getattr(own, name)), name
    assert own.own_ids_TK is None and given.own_ids_TK is not None and torch.equal(given.own_ids_TK, own.topk_ids_TK)
    assert torch.equal(router.counts_E, counts) and counts.sum() == TOKENS * config.topk
    assert all(map(torch.equal, gradients(router, x, given), of_own))


def another_choice(config: RouterConfig) -> Tensor:
    """int16 [T, K]: distinct experts at random, of any groups; every fourth token has none."""
    order = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5)).argsort(-1)
    given = order[:, : config.topk].to(torch.int16)
    given[::4] = -1
    return given


@pytest.mark.parametrize("config", FREE.values(), ids=FREE)
def test_another_choice_is_fp64_autograd_of_the_formulas(config: RouterConfig) -> None:
    router, x, given = build(config), torch.randn(TOKENS, DIM, requires_grad=True), another_choice(config)
    own = router(x, SEQUENCES)
    router.counts_E.zero_()
    routing = router(x, SEQUENCES, None, given)
    ids = torch.where(given >= 0, given.long(), own.topk_ids_TK)
    assert torch.equal(routing.topk_ids_TK, ids) and not torch.equal(ids, own.topk_ids_TK)
    assert torch.equal(routing.own_ids_TK, own.topk_ids_TK)  # type: ignore[arg-type]
    assert torch.equal(router.counts_E, torch.bincount(ids.flatten(), minlength=EXPERTS))

    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, router.weight))
    leaves, logits = [exact_x, exact_weight], exact_x @ exact_weight.T
    if router.gate_bias is not None:
        leaves.append(router.gate_bias.detach().double().requires_grad_())
        logits = logits + leaves[2]
    scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
    chosen = (logits.exp() if config.score == "softmax_topk" else scores).gather(1, ids)
    weights = chosen / chosen.sum(-1, keepdim=True) if config.normalize_topk else chosen
    weights = weights * config.route_scale
    shares = (scores / scores.sum(-1, keepdim=True)).view(SEQUENCES, -1, EXPERTS).mean(1)
    loads = torch.stack([torch.bincount(part.flatten(), minlength=EXPERTS) for part in ids.view(SEQUENCES, -1)])
    loss = (loads / (TOKENS / SEQUENCES * config.topk / EXPERTS) * shares).sum()
    torch.testing.assert_close(routing.topk_weights_TK.double(), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.balance_loss.double(), loss, rtol=1e-5, atol=0)

    found = gradients(router, x, routing)
    d_weights = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad((weights, loss), leaves, (d_weights, torch.tensor(0.7).double()))
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5


def test_loads_are_counted_in_training_forwards_only_and_nothing_waits() -> None:
    router, x = build(SOFTMAX), torch.randn(TOKENS, DIM)
    with record_waits() as waits:
        router(x, SEQUENCES, None, another_choice(SOFTMAX))
    assert waits == [] and router.counts_E.sum() == TOKENS * 3
    router.eval()(x, SEQUENCES, None, another_choice(SOFTMAX))
    with torch.no_grad():
        router.train()(x, SEQUENCES, None, another_choice(SOFTMAX))
    assert router.counts_E.sum() == TOKENS * 3


def test_weights_are_those_of_the_op_itself() -> None:
    """Against `kernels.route` directly, whose choice no router has touched."""
    router, x = build(SIGMOID), torch.randn(TOKENS, DIM)
    options = {"topk": 2, "num_groups": 4, "top_groups": 2, "score": "sigmoid", "group_score": "top2_sum"}
    ids, weights, loss, _ = route(
        x @ router.weight.detach().T, router.bias_E, None, **options, normalize=True, route_scale=2.5,
        num_sequences=SEQUENCES, force_balance=False,
    )  # type: ignore[arg-type]  # fmt: skip
    router.bias_E.normal_()  # another bias, another choice, were it not given
    routing = router(x, SEQUENCES, None, ids.to(torch.int16))
    assert torch.equal(routing.topk_ids_TK, ids) and not torch.equal(routing.own_ids_TK, ids)  # type: ignore[arg-type]
    torch.testing.assert_close(routing.topk_weights_TK, weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(routing.balance_loss, loss, rtol=1e-6, atol=0)
