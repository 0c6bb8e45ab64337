"""Biases of experts, group by group: all arithmetic in FP32, y rounded once to its dtype."""

from itertools import pairwise

from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor, Rows


def add_expert_bias(y: Tensor, bias: Tensor, group_offsets: Tensor, weights: Tensor | None = None) -> None:
    for of_expert, rows in zip(bias.float(), _groups(group_offsets), strict=True):
        added = of_expert if weights is None else weights[rows, None] * of_expert
        y[rows] = y[rows].float() + added


def expert_bias_dgrad(dy: Rows, bias: Tensor, group_offsets: Tensor, d_weights: Tensor) -> None:
    values = dy.dequantize() if isinstance(dy, Fp8Tensor) else dy
    for of_expert, rows in zip(bias.float(), _groups(group_offsets), strict=True):
        d_weights[rows] += (values[rows].float() * of_expert).sum(1)


def expert_bias_wgrad(dy: Rows, group_offsets: Tensor, main_grad: Tensor, weights: Tensor | None = None) -> None:
    all_rows = dy.dequantize().t() if isinstance(dy, Fp8Tensor) else dy
    for of_expert, rows in zip(main_grad, _groups(group_offsets), strict=True):
        values = all_rows[rows].float()
        of_expert += (values if weights is None else values * weights[rows, None]).sum(0)


def _groups(group_offsets: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(group_offsets.tolist())]
