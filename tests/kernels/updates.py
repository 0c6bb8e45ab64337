"""State of an update, and AdamW in correctly rounded FP32: what every back end's arithmetic is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 7}


def state(
    *shape: int, moments: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """master, grad, exp_avg, exp_avg_sq of values that reach over many sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = (torch.randn(shape, generator=generator) for _ in range(4))
    master, grad, exp_avg, root = (x * 10 ** torch.empty_like(x).uniform_(-4, 0, generator=generator) for x in normal)
    made = (master, grad, exp_avg.to(moments), root.square().to(moments))
    return tuple(tensor.to(device) for tensor in made)  # type: ignore[return-value]


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of FP32 by way of FP64, where the product is exact."""
    return (a.double() * b.double() + c.double()).float()


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], before: Sequence[Tensor], grad: Tensor) -> None:
    """(master, exp_avg, exp_avg_sq), moments FP32, are two ways to round one update of `before`.

    PyTorch's square root on a CPU is within a unit of the last place, and not every CPU fuses multiply and add.
    """
    (w, m, v), (w2, m2, v2), (w0, m0, _) = ([x.cpu().double() for x in one] for one in (got, expected, before))
    assert bool(((m - m2).abs() <= 2**-22 * (m0.abs() + grad.cpu().abs())).all())
    assert bool(((v - v2).abs() <= 2**-22 * v2).all())
    # The change is m over a root: it inherits what m may be off by.
    change, cancelled = (w2 - w0).abs(), 2**-22 * (m0.abs() + grad.cpu().abs()) / m2.abs().clamp(min=1e-30)
    assert bool(((w - w2).abs() <= (2**-22 + cancelled) * change + 2**-23 * w2.abs()).all())


def update_exactly(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(master, exp_avg, exp_avg_sq) after the step, every operation rounded as IEEE asks."""

    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32)

    g = grad.cpu() if grad_scale is None else grad.cpu() * grad_scale.cpu()
    m, v, rate = exp_avg.cpu().float(), exp_avg_sq.cpu().float(), number(1 - beta1)
    m = fused(rate, g - m, m) if rate < 0.5 else fused(rate - 1, g - m, g)
    v = fused(number(1 - beta2) * g, g, number(beta2) * v)
    denominator = v.double().sqrt().float() / number(math.sqrt(1 - beta2**step)) + number(eps)
    change = number(-lr / (1 - beta1**step)) * m / denominator
    w = master.cpu() * number(1 - lr * weight_decay) + change
    return w, m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
