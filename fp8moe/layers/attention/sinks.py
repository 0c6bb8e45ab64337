"""Attention sinks: a learned logit a head that takes part in each query's softmax and has no value (GPT-OSS).

A kernel that returns the log-sum-exp of its scores needs to know nothing of them: its output is multiplied by
    exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink),
exactly, and the gradients of that factor go back into lse and the sinks. Refused: a key more with the sink as its
score, which costs a dense bias of scores. Numerics: FP32 inside, one rounding to the output's dtype.

Legend: B sequences, S tokens of a sequence, H heads, V features of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.layers.bias import add_total
from fp8moe.layers.linear import main_grad_of
from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe


def make_sinks(num_heads: int, recipe: Recipe) -> nn.Parameter:
    """Uninitialised sinks [H] in the recipe's dtype; `init_weights` makes them zero: each weighs as a score of 0."""
    sinks = nn.Parameter(torch.empty(num_heads, dtype=recipe.dtype))
    sinks.initial_value = 0.0  # type: ignore[attr-defined]
    return sinks


def widened(sinks: nn.Parameter) -> Tensor:
    """The sinks in FP32; their gradient goes into `main_grad` in FP32, with the weight gradients."""
    return _WidenedFunction.apply(sinks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out [B, S, H, V] of a softmax without sinks, its log-sum-exp [B, S, H] and sinks [H], both FP32 -> with them."""
    return _SinksFunction.apply(out, lse, sinks)


class _WidenedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sinks: nn.Parameter) -> Tensor:
        ctx.sinks = sinks
        return sinks.detach().float().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        sinks, (gradient,) = ctx.sinks, grads
        submit(lambda: add_total(main_grad_of(sinks), gradient))


class _SinksFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
        share = torch.sigmoid(lse - sinks)
        ctx.save_for_backward(out, share)
        return _scaled(out, share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (out, share), dy = ctx.saved_tensors, grads[0]
        d_lse = (dy.float() * out).sum(-1) * share * (1 - share)
        return _scaled(dy, share), d_lse, -d_lse.flatten(0, 1).sum(0)


def _scaled(x: Tensor, share: Tensor) -> Tensor:
    """x [B, S, H, V] times share [B, S, H] FP32, rounded once; no FP32 copy of x."""
    return torch.mul(x, share[..., None], out=torch.empty_like(x))
