"""AdamW with FP32 masters and BF16 moments (DeepSeek-V3, sections 3.3 and 4.2).

The weights that a forward reads are BF16 copies, rounded from the masters after each update; in FP32 the parameter is
its own master. Decay is decoupled and falls on matrices only (two or more dimensions, the router's and the embedding
included), never on norms: the report gives 0.1 and no list, and a norm's gain has no reason to shrink to zero. The
gradient arrives as FP32 `main_grad`, already reduced; the clip factor is applied inside the update, so that no pass
over the gradients is spent on it. Every rank keeps the whole state of the parameters that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.kernels.adamw import adamw_step
from fp8moe.train.lr import LearningRateConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's constants, and `schedule`: the learning rate along the run.

    clip_norm: bound of the global gradient norm. moments: dtype of both moments.
    """

    schedule: LearningRateConfig
    beta1: float = 0.9
    beta2: float = 0.95
    moments: Literal["bf16", "fp32"] = "bf16"
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay < 0.0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be at least 0: use 0 for none")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1: DeepSeek-V3 used "
                    f"{getattr(type(self), name)}"
                )
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be above 0: use {getattr(type(self), name)}"
                )


@dataclass(frozen=True)
class ParameterState:
    """One parameter and what the optimizer keeps for it, all of its shape: FP32 master, two moments."""

    parameter: Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def decays(self) -> bool:
        return self.parameter.ndim >= 2


class AdamW:
    """Updates the given parameters, which must have been initialised, from their `main_grad`.

    `updates` counts updates done: the bias correction's step, which a skipped step doesn't advance.
    """

    def __init__(self, parameters: Mapping[str, Parameter], config: OptimizerConfig) -> None:
        self.config = config
        self.updates = 0
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.states = {name: _new_state(parameter, moments) for name, parameter in parameters.items()}

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it."""
        self.updates += 1
        scale = min(1.0, self.config.clip_norm / (grad_norm + 1e-6))
        for state in self.states.values():
            adamw_step(
                state.master,
                state.parameter.main_grad,  # type: ignore[attr-defined]
                state.exp_avg,
                state.exp_avg_sq,
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay if state.decays else 0.0,
                step=self.updates,
                grad_scale=scale,
            )
        self.write_parameters()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters into the parameters: after an update, and after masters were loaded."""
        for state in self.states.values():
            if state.parameter.dtype != torch.float32:
                state.parameter.copy_(state.master)

    def tensors(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """(canonical name, parameter it belongs to, tensor) of all that a checkpoint must hold."""
        for name, state in self.states.items():
            yield f"master.{name}", state.parameter, state.master
            yield f"exp_avg.{name}", state.parameter, state.exp_avg
            yield f"exp_avg_sq.{name}", state.parameter, state.exp_avg_sq


def _new_state(parameter: Parameter, moments: torch.dtype) -> ParameterState:
    values = parameter.detach()
    master = values if values.dtype == torch.float32 else values.float()
    return ParameterState(
        parameter,
        master,
        torch.zeros_like(values, dtype=moments),
        torch.zeros_like(values, dtype=moments),
    )
