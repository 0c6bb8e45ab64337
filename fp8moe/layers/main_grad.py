"""FP32 gradients that outlive a micro-batch: one flat buffer for dense parameters, one for experts.

Every parameter gets `main_grad`, a view of a flat buffer in the order of `model.parameters()`, so that one collective
reduces many parameters and zeroing is one call. Linears add into it themselves (see `wgrad`); parameters whose gradient
autograd computes (norms, gate) get a hook that moves `.grad` over. `.grad` is always None between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter


@dataclass(frozen=True)
class MainGrads:
    """The flat FP32 buffers: `dense` is reduced over all data-parallel ranks, `expert` over those with its experts."""

    dense: torch.Tensor
    expert: torch.Tensor

    def zero_(self) -> None:
        self.dense.zero_()
        self.expert.zero_()


def is_expert(parameter: Parameter) -> bool:
    """Whether this rank holds only its own share of the parameter's experts (dimension 0)."""
    return getattr(parameter, "is_expert", False)


def _gather(parameter: torch.Tensor) -> None:
    if parameter.grad is None:  # a Linear's weight, which is on the tape but adds its gradient itself
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def attach_main_grads(model: nn.Module) -> MainGrads:
    """Give every parameter its zeroed `main_grad` (its shape and device, FP32) and return the buffers behind them."""
    flats = []
    for expert in (False, True):
        parameters = [p for p in model.parameters() if is_expert(p) is expert]
        device = parameters[0].device if parameters else torch.device("cpu")
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=device)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.main_grad = part.view(parameter.shape)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_gather)
        flats.append(flat)
    return MainGrads(*flats)
