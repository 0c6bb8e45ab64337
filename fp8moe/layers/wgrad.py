"""Weight gradients: the FP32 buffers they are added into, and how a schedule puts them off.

Every parameter gets `main_grad`, a view of a flat FP32 buffer in the order of `model.parameters()`, so that one
collective reduces many parameters and zeroing is one call; it outlives a micro-batch. Linears add into it themselves;
parameters whose gradient autograd computes (norms, gate) get a hook that moves `.grad` over. `.grad` is always None
between steps.

A backward is two products: dgrad, which the layer below needs at once, and wgrad, which nobody needs before the
optimizer. Zero-bubble and DualPipe schedules run them apart (arXiv 2401.10241). Every Linear hands its wgrad over with
`submit`: outside `DeferredWgrads.collect` it runs on the spot, which is ordinary training, inside it waits for
`DeferredWgrads.run`. Results are bit-equal: the same products, in the same order within a parameter. Hooks on autograd
nodes were refused: they can't tell the two products of one node apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter

_collecting: list[Callable[[Callable[[], None]], None]] = []


def submit(wgrad: Callable[[], None]) -> None:
    """Run `wgrad` now, or leave it to the `DeferredWgrads` that collects. It must add into a `main_grad`."""
    if _collecting:
        _collecting[-1](wgrad)
    else:
        wgrad()


class DeferredWgrads:
    """Weight gradients of one phase of one micro-batch, put off; first in, first out."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within the block, every submitted weight gradient waits here.

        What collects is the process's, not the thread's: on a GPU autograd runs a backward in a thread of its own.
        """
        _collecting.append(self._waiting.append)
        try:
            yield
        finally:
            _collecting.pop()

    @torch.no_grad()
    def run(self) -> None:
        """Compute what waits, in the order in which it came, and forget it."""
        waiting, self._waiting = self._waiting, []
        for wgrad in waiting:
            wgrad()

    def __len__(self) -> int:
        return len(self._waiting)


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


def _move_grad(parameter: torch.Tensor) -> None:
    if parameter.grad is None:  # a Linear's weight, which autograd follows but which adds its gradient itself
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
            parameter.register_post_accumulate_grad_hook(_move_grad)
        flats.append(flat)
    return MainGrads(*flats)
