"""A two-block model, dense then experts, and its blocks run by autograd, phase by phase, and as an overlapped pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.layers.attention import Positions
from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.layers.router import Router
from fp8moe.model.block import Block
from fp8moe.model.phases import BalanceLoss, DensePass, MoePass, pass_through
from fp8moe.model.transformer import Transformer, init_weights
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE
from tests.model.shapes import changed

B, S, BALANCE = 2, 24, 0.25
NOTHING: frozenset[Recompute] = frozenset()
CHOICES = [*(frozenset({name}) for name in Recompute), FULL_RECOMPUTE]
IDS = ["norm", "mla_up", "swiglu", "all"]
# Heads of equal size: PyTorch's fused attention on a CPU, which saves q, k and v themselves.
CONFIG = changed(BASE, num_layers=2, num_dense_layers=1, mtp_depth=1, v_dim=32)
# The start order of an overlapped pair: a backward's and a forward's phases, each in its own order, mixed.
PAIR = ("B combine", "F attn", "F dispatch", "B mlp", "B dispatch", "W mlp", "F mlp", "F combine", "B attn", "W attn")


def build(
    precision: Precision, recompute: frozenset[Recompute], dispatcher: Dispatcher | None = None, ep_rank: int = 0,
    **changes: Any,
) -> Transformer:  # fmt: skip
    config = changed(CONFIG, **changes)
    dispatcher = dispatcher or LocalDispatcher(config.experts.num_experts)
    model = Transformer(config, Recipe(precision, recompute), dispatcher)
    init_weights(model, seed=3, ep_rank=ep_rank)
    return model


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stream(model: Transformer, seed: int) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a block."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, B * S, CONFIG.dim, generator=generator).to(model.recipe.dtype)
    return x, dy


def positions(model: Transformer) -> Positions:
    return model.positions(torch.arange(S).expand(B, -1))


def grads(model: Transformer) -> list[Tensor]:
    """Every parameter's `main_grad`, which is zeroed."""
    out = [p.main_grad.clone() for p in model.parameters()]  # type: ignore[operator]
    model.main_grads.zero_()
    return out


def loads(model: Transformer) -> list[Tensor]:
    return [module.counts_E.clone() for module in model.modules() if isinstance(module, Router)]


def step(model: Transformer) -> list[Tensor]:
    """One micro-batch of the whole model, MTP included: loss sums, every main_grad, every load."""
    sums = model(tokens(CONFIG.vocab_size, B, S))
    (sums.main + 0.3 * sums.mtp + BALANCE * sums.balance).backward()
    return [sums.main.detach(), sums.mtp.detach(), sums.balance.detach(), *grads(model), *loads(model)]


def autograd(model: Transformer, layer: int, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and input gradient of a block under ordinary autograd."""
    x = x.clone().requires_grad_()
    y, balance = model.block(layer)(x, positions(model))
    torch.autograd.backward([y, balance], [dy, torch.tensor(BALANCE)]) if balance.requires_grad else y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


def start(model: Transformer, layer: int, x: Tensor) -> DensePass | MoePass:
    return start_at(model.block(layer), x, positions(model))


def start_at(block: Block, x: Tensor, positions: Positions) -> DensePass | MoePass:
    return pass_through(block, lambda: x, positions, BalanceLoss(BALANCE, lambda loss: None))


def forward(block_pass: DensePass | MoePass) -> Tensor:
    for phase in block_pass.phases:
        phase.forward()
    return block_pass.output


def backward(block_pass: DensePass | MoePass, dy: Tensor) -> Tensor:
    block_pass.backward_from(lambda: dy)
    for phase in reversed(block_pass.phases):
        phase.backward()
    return block_pass.input_gradient


def wgrads(block_pass: DensePass | MoePass) -> None:
    for phase in block_pass.phases:
        if phase.wgrad:
            phase.wgrad()


def interleaved(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """Two micro-batches one after the other under autograd, and as an overlapped pair: outputs and gradients."""
    (x0, dy0), (x1, dy1) = stream(model, 0), stream(model, 1)
    expected = [*autograd(model, 1, x0, dy0), *autograd(model, 1, x1, dy1), *grads(model)]

    old = start(model, 1, x0)
    y0 = forward(old)
    old.backward_from(lambda: dy0)
    new = start(model, 1, x1)
    by_name = {"F": {p.name: p.forward for p in new.phases}, "B": {p.name: p.backward for p in old.phases},
               "W": {p.name: p.wgrad for p in old.phases}}  # fmt: skip
    for entry in PAIR:
        direction, name = entry.split()
        action = by_name[direction][name]
        assert action is not None
        action()
    y1, dx1 = new.output, backward(new, dy1)
    wgrads(new)
    return expected, [y0, old.input_gradient, y1, dx1, *grads(model)]
