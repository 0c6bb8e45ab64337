"""AdamW with FP32 masters and BF16 moments (DeepSeek-V3, sections 3.3 and 4.2).

The weights that a forward reads are BF16 copies, rounded from the masters within each update; in FP32 the parameter is
its own master. Decay is decoupled and falls on matrices only (two or more dimensions, the router's and the embedding
included), never on norms: the report gives 0.1 and no list, and a norm's gain has no reason to shrink to zero. The
gradient arrives as FP32 `main_grad`, already reduced; the clip factor is applied inside the update, so that no pass
over the gradients is spent on it. Every rank keeps the whole state of the parameters that it holds.

Masters, moments and BF16 weights are flat buffers in the order of the flat gradients, and parameters become views of
them: one launch updates all parameters of a buffer. Writing each parameter through a table of addresses was refused,
views are what gradients are already, and a shard of a flat buffer is a slice. A weight that FP8 products read is
updated by a launch of its own, which writes its blocks too.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.segments import Segments
from fp8moe.layers.linear import MainGrads, QuantizedWeight, is_expert
from fp8moe.train.optimizer.config import OptimizerConfig


@dataclass(frozen=True)
class ParameterState:
    """One parameter and what the optimizer keeps for it, views of the flat buffers: FP32 master, two moments."""

    parameter: Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class FlatState:
    """The parameters of one flat gradient buffer, end to end in its order, and what the optimizer keeps for them.

    weight: the BF16 parameters are views of it; None where all are FP32, which are views of master. segments: what
    `adamw_step` updates, all but the weights whose FP8 blocks are written in the same pass.
    """

    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor | None
    segments: Segments

    def of(self, parameter: Parameter) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(master, gradient, moments) of `parameter`, in its shape."""
        start = _offset(self.grad, parameter)
        values, shape = slice(start, start + parameter.numel()), parameter.shape
        return (
            self.master[values].view(shape),
            self.grad[values].view(shape),
            self.exp_avg[values].view(shape),
            self.exp_avg_sq[values].view(shape),
        )


class AdamW:
    """Updates the parameters of `model`, which must have been initialised, from their `main_grad` in `main_grads`.

    They become views of flat buffers. `updates` counts updates done: the bias correction's step, which a skipped step
    doesn't advance.
    """

    def __init__(self, model: nn.Module, main_grads: MainGrads, config: OptimizerConfig) -> None:
        self.config = config
        self.updates = 0
        self.states: dict[str, ParameterState] = {}
        self._quantized: list[tuple[QuantizedWeight, FlatState]] = []
        self._flats: list[FlatState] = []
        fp8 = {m.weight: m for m in model.modules() if isinstance(m, QuantizedWeight) and m.recipe.fp8}
        named = {p: name for name, p in model.named_parameters()}
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        for grad, expert in ((main_grads.dense, False), (main_grads.expert, True)):
            parameters = [p for p in named if is_expert(p) is expert]
            flat = _flat_state(parameters, grad, moments, fp8)
            self._flats.append(flat)
            self._quantized += [(fp8[p], flat) for p in parameters if p in fp8]
            for p in parameters:
                master, _, exp_avg, exp_avg_sq = flat.of(p)
                self.states[named[p]] = ParameterState(p, master, exp_avg, exp_avg_sq)
        self.states = {name: self.states[name] for name in named.values()}

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it.

        Weights, masters and moments change, and the FP8 blocks of the weights that have some. One launch a flat buffer
        and one a weight with blocks; nothing waits for the device.
        """
        self.updates += 1
        c, scale = self.config, min(1.0, self.config.clip_norm / (grad_norm + 1e-6))
        settings: dict[str, Any] = dict(
            lr=lr,
            beta1=c.beta1,
            beta2=c.beta2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            step=self.updates,
            grad_scale=self._flats[0].master.new_full((), scale),
        )
        for flat in self._flats:
            adamw_step(flat.master, flat.grad, flat.exp_avg, flat.exp_avg_sq, flat.segments, flat.weight, **settings)
        for module, flat in self._quantized:
            weight, both = module.weight, (module.blocks, module.transposed_blocks)
            power_of_two = module.recipe.power_of_two(False)
            adamw_step_quantize(*flat.of(weight), weight.detach(), *both, **settings, power_of_two=power_of_two)

    @torch.no_grad()
    def write_parameters(self, source: Mapping[str, Tensor] | None = None) -> None:
        """Round `source` into the parameters, or the masters; FP8 blocks are `quantize_weights`' then.

        source: FP32 by a parameter's name, in its shape, on any device. Masters stay as they are: an FP32 parameter,
        its own master, leaves it for `source` until masters are written again.
        """
        for name, state in self.states.items():
            value = state.master if source is None else source[name]
            if state.parameter.dtype != torch.float32:
                state.parameter.copy_(value)
            else:
                state.parameter.data = value.to(state.master.device)

    def tensors(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """(canonical name, parameter it belongs to, tensor) of all that a checkpoint must hold."""
        for name, state in self.states.items():
            yield f"master.{name}", state.parameter, state.master
            yield f"exp_avg.{name}", state.parameter, state.exp_avg
            yield f"exp_avg_sq.{name}", state.parameter, state.exp_avg_sq


def _flat_state(
    parameters: Sequence[Parameter], grad: Tensor, moments: torch.dtype, fp8: Container[Parameter]
) -> FlatState:
    """The state of `parameters`, whose `main_grad` are views of `grad` in this order, as they are now."""
    assert sum(p.numel() for p in parameters) == grad.numel(), "main_grads are of another model"
    master = torch.empty_like(grad)
    is_rounded = any(p.dtype is torch.bfloat16 for p in parameters)
    weight = torch.empty_like(grad, dtype=torch.bfloat16) if is_rounded else None
    spans, start = [], 0
    for p in parameters:
        stop = start + p.numel()
        assert _offset(grad, p) == start, "main_grads are in another order"
        master[start:stop].copy_(p.detach().flatten())
        own = master
        if p.dtype is not torch.float32:
            assert weight is not None and p.dtype is torch.bfloat16, p.dtype
            own = weight
            own[start:stop].copy_(p.detach().flatten())
        p.data = own[start:stop].view(p.shape)
        if p not in fp8:
            spans.append((start, stop, p.ndim >= 2))
        start = stop
    exp_avg, exp_avg_sq = (torch.zeros_like(grad, dtype=moments) for _ in range(2))
    return FlatState(grad, master, exp_avg, exp_avg_sq, weight, Segments.of(spans, grad.device))


def _offset(grad: Tensor, parameter: Parameter) -> int:
    main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return int(main_grad.storage_offset() - grad.storage_offset())
