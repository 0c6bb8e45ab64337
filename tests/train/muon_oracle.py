"""`torch.optim.Muon` on matrices one by one, which ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(weights: Sequence[Tensor], **settings: Any) -> tuple[list[Parameter], torch.optim.Optimizer]:
    parameters = [Parameter(weight.detach().clone()) for weight in weights]
    return parameters, torch.optim.Muon(parameters, momentum=settings.pop("momentum", 0.95), **settings)


def take_step(parameters: list[Parameter], optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
