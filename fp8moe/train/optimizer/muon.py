"""Muon for the matrices of hidden layers, AdamW for all other parameters: embedding, output head, norms, gates.

What is a matrix is `layers.linear.matrices`: each expert's by itself, gate and up apart, both down projections of
attention apart, heads together. Momentum is the only state beside the master, half of what AdamW keeps. One learning
rate and one decay serve both (`muon_step.size_factor`). Parameters that lie side by side in the flat gradients share a
flat buffer, as AdamW's do; one buffer for all matrices was refused, it would need gradients in another order.

FP8 blocks are cast from the new weights in a launch of their own: the update is a chain of products already, and one
more pass over the weight is lost in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.layers.linear import MainGrads, Matrix, QuantizedWeight, matrices
from fp8moe.train.optimizer.adamw import AdamW, ParameterState, flat_weights, offset, runs
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.muon_step import muon_step


@dataclass(frozen=True)
class MomentumState:
    """One parameter and what Muon keeps for it, views of the flat buffers: FP32 master, momentum."""

    parameter: Parameter
    master: Tensor
    momentum: Tensor


@dataclass(frozen=True)
class FlatMomentum:
    """Parameters that lie side by side in a flat gradient, end to end, and what Muon keeps for them.

    weight: the BF16 parameters are views of it; None where all are FP32, which are views of master.
    """

    grad: Tensor
    master: Tensor
    momentum: Tensor
    weight: Tensor | None
    matrices: tuple[Matrix, ...]


class Muon:
    """Updates the parameters of `model`, which must have been initialised, from their `main_grad` in `main_grads`.

    They become views of flat buffers. Takes `AdamW`'s place: the same calls, and the same meaning of each.
    """

    def __init__(self, model: nn.Module, main_grads: MainGrads, config: OptimizerConfig) -> None:
        self.config = config
        named = {p: name for name, p in model.named_parameters()}
        own = {p for p in named if matrices(p)}
        self._adamw = AdamW(model, main_grads, config, others=own)
        self._quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight) and m.weight in own]
        self._flats: list[FlatMomentum] = []
        self._own: dict[str, MomentumState] = {}
        self._device = main_grads.dense.device
        dtype = torch.bfloat16 if config.moments == "bf16" else torch.float32
        for parameters, grad in runs(model, main_grads, own.__contains__):
            flat = _flat_momentum(parameters, grad, dtype)
            self._flats.append(flat)
            for p in parameters:
                values = slice(offset(grad, p), offset(grad, p) + p.numel())
                master, momentum = (t[values].view(p.shape) for t in (flat.master, flat.momentum))
                self._own[named[p]] = MomentumState(p, master, momentum)

    @property
    def updates(self) -> int:
        """Updates done, which a skipped step doesn't advance."""
        return self._adamw.updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._adamw.updates = updates

    @property
    def states(self) -> dict[str, ParameterState | MomentumState]:
        """What is kept for each parameter by its canonical name, AdamW's first."""
        return {**self._adamw.states, **self._own}

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it.

        Weights, masters, moments and momentum change, and the FP8 blocks of the weights that have some. Nothing waits
        for the device.
        """
        self._adamw.step(lr, grad_norm)
        c, scale = self.config, torch.full((), self.config.grad_scale(grad_norm), device=self._device)
        for flat in self._flats:
            muon_step(
                flat.master,
                flat.grad,
                flat.momentum,
                flat.weight,
                flat.matrices,
                lr=lr,
                momentum_beta=c.muon_beta,
                nesterov=c.nesterov,
                ns_steps=c.ns_steps,
                weight_decay=c.weight_decay,
                adjust=c.adjust,
                grad_scale=scale,
            )
        for module in self._quantized:
            module.quantize()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters into the parameters, after masters were loaded; FP8 blocks are `quantize_weights`' then."""
        self._adamw.write_parameters()
        for state in self._own.values():
            if state.parameter.dtype != torch.float32:
                state.parameter.copy_(state.master)

    def tensors(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """(canonical name, parameter it belongs to, tensor) of all that a checkpoint must hold."""
        yield from self._adamw.tensors()
        for name, state in self._own.items():
            yield f"master.{name}", state.parameter, state.master
            yield f"momentum.{name}", state.parameter, state.momentum


def _flat_momentum(parameters: Sequence[Parameter], grad: Tensor, dtype: torch.dtype) -> FlatMomentum:
    """The state of `parameters`, whose `main_grad` are views of `grad` in this order, as they are now."""
    master, weight = flat_weights(parameters, grad)
    placed = tuple(matrix.shifted(offset(grad, p)) for p in parameters for matrix in matrices(p))
    return FlatMomentum(grad, master, torch.zeros_like(grad, dtype=dtype), weight, placed)
