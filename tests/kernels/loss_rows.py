"""Logits and labels that tests of the cross entropy share, its definition in FP64, and its bounds."""

import torch
from torch import Tensor

from fp8moe.kernels.cross_entropy import IGNORE


def logits_and_labels(
    rows: int, size: int, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Rows of logits of very different spread, some nearly certain; every third label is ignored."""
    spread = torch.logspace(-2, 1.7, rows, device=device)[torch.randperm(rows, device=device)]
    x = torch.randn(rows, size, device=device) * spread[:, None] + 3 * torch.randn(rows, 1, device=device)
    labels = torch.randint(size, (rows,), device=device)
    certain = torch.arange(0, rows, 4, device=device)
    x[certain, labels[certain]] += 40
    labels[::3] = IGNORE
    return x.to(dtype), labels


def definition(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Losses and gradients of logits in FP64, by autograd of the plain formula."""
    x = logits.double().requires_grad_()
    kept = labels != IGNORE
    chosen = x.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    losses = torch.where(kept, x.exp().sum(1).log() - chosen, 0.0)
    losses.sum().backward(torch.tensor(weight, dtype=torch.float64, device=x.device))
    assert x.grad is not None
    return losses.detach(), x.grad


def assert_within_bounds(
    losses: Tensor, gradients: Tensor, logits: Tensor, labels: Tensor, weight: float, *, storage: float
) -> None:
    """Both bounds of the README; `storage` is half a unit in the last place of the logits' dtype."""
    exact_losses, exact = definition(logits, labels, weight)
    wide = logits.double()
    top = wide.max(1).values
    unit = 2.0**-23
    slack = 1 + exact_losses + (top - wide.gather(1, labels.clamp(min=0)[:, None])[:, 0]).abs()
    assert bool(((losses.double() - exact_losses).abs() <= 4 * unit * slack).all())
    share = wide.softmax(1)
    one_hot = torch.zeros_like(wide).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    slack = share * (8 + top[:, None] - wide) + one_hot
    bound = weight * 2 * unit * slack * (labels != IGNORE)[:, None]
    error = (gradients.double() - exact).abs()
    assert bool(
        (error <= bound * (1 + storage) + storage * exact.abs() + 2.0**-126).all()
    )  # FP32 has nothing normal below
    assert not bool(losses[labels == IGNORE].any()) and not bool(gradients[labels == IGNORE].any())


STORAGE = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
