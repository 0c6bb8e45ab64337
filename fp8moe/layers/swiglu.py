"""SwiGLU, one trio of functions a precision: forward, its output again for Wgrad, backward.

    swiglu(gate_up [R, 2F], weights [R] | None)  ->  (rows of silu(gate) * up * weight [R, F], what is cached)
    columns(cached, weights)                     ->  the same output again, as columns for the down projection's Wgrad
    backward(dy [R, F], cached, weights)         ->  (Operand of d gate_up, d weights [R] | None)

Only the input is cached, in FP8 under FP8; the output is recomputed in the backward (DeepSeek-V3 report, 3.3.3).
The routing weight is applied here and nowhere else, so that combine is a plain sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8moe.kernels import swiglu as fp8
from fp8moe.layers.operand import Operand, Rows
from fp8moe.layers.precision import Precision


class Swiglu(NamedTuple):
    """The trio; `cached` is opaque to the caller."""

    forward: Callable[[Tensor, Tensor | None], tuple[Rows, Any]]
    columns: Callable[[Any, Tensor | None], Rows]
    backward: Callable[[Tensor, Any, Tensor | None], tuple[Operand, Tensor | None]]


def _product(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    return product if weights is None else product * weights[:, None]


def _forward(gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return _product(gate_up, weights).to(gate_up.dtype), gate_up


def _columns(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    return _product(gate_up, weights).to(gate_up.dtype)


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


def _fp8_backward(dy: Tensor, cached: Any, weights: Tensor | None) -> tuple[Operand, Tensor | None]:
    rows, columns, dweights = fp8.swiglu_backward(dy, cached, weights)
    return Operand(rows, lambda: columns), dweights


_PLAIN = Swiglu(_forward, _columns, _backward)
_FP8 = Swiglu(fp8.swiglu, fp8.swiglu_columns, _fp8_backward)


def swiglu(precision: Precision) -> Swiglu:
    """The trio for `precision`."""
    return _FP8 if precision is Precision.FP8 else _PLAIN
