"""SwiGLU, one pair of functions a precision: forward and backward.

    forward(gate_up [R, 2F], weights [R] | None)  ->  (Operand of silu(gate) * up * weight [R, F], what is cached)
    backward(dy [R, F], cached, weights)          ->  (Operand of d gate_up, d weights [R] | None)

The input is cached, in FP8 under FP8. The output's columns, for the down projection's Wgrad, are recomputed from it
(DeepSeek-V3 report, 3.3.3). In BF16 and FP32 the output may be kept instead; FP8 has no such choice, since keeping it
would give other bits than the recipe's, which makes columns from the cached copy of the input.
The routing weight is applied here and nowhere else, so that combine is a plain sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8moe.kernels import swiglu as fp8
from fp8moe.layers.operand import Operand
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recompute


class Swiglu(NamedTuple):
    """The pair; `cached` is opaque to the caller."""

    forward: Callable[[Tensor, Tensor | None], tuple[Operand, Any]]
    backward: Callable[[Tensor, Any, Tensor | None], tuple[Operand, Tensor | None]]


def _product(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    return (product if weights is None else product * weights[:, None]).to(gate_up.dtype)


def _forward(gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor]:
    return Operand(_product(gate_up, weights), partial(_product, gate_up, weights)), gate_up


def _forward_keeping(gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor]:
    product = _product(gate_up, weights)
    return Operand(product, lambda: product), gate_up


def _backward(dy: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor | None]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dweights = None if weights is None else (dy * silu * up).sum(-1)
    if weights is not None:
        dy = dy * weights[:, None]
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    d_gate_up = torch.cat([dgate, dy * silu], dim=-1).to(gate_up.dtype)
    return Operand(d_gate_up, lambda: d_gate_up), dweights


def _fp8_forward(gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Any]:
    rows, cached = fp8.swiglu(gate_up, weights)
    return Operand(rows, partial(fp8.swiglu_columns, cached, weights)), cached


def _fp8_backward(dy: Tensor, cached: Any, weights: Tensor | None) -> tuple[Operand, Tensor | None]:
    rows, columns, dweights = fp8.swiglu_backward(dy, cached, weights)
    return Operand(rows, lambda: columns), dweights


_AGAIN = Swiglu(_forward, _backward)
_KEEPING = Swiglu(_forward_keeping, _backward)
_FP8 = Swiglu(_fp8_forward, _fp8_backward)


def swiglu(precision: Precision, *, recompute: frozenset[Recompute] = DEFAULT) -> Swiglu:
    """The pair for `precision`; what it keeps of its output in BF16 and FP32 is for `recompute` to say."""
    if precision is Precision.FP8:
        return _FP8
    return _AGAIN if Recompute.SWIGLU in recompute else _KEEPING
