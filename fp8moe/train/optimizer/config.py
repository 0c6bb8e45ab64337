"""The optimizers' constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fp8moe.train.lr import LearningRateConfig

Kind = Literal["adamw", "muon"]
Sharding = Literal["auto", "none", "zero1", "deepspeed"]
Adjust = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its constants, and `schedule`: the learning rate along the run.

    kind: adamw, or muon, which updates the matrices of hidden layers and leaves the other parameters to AdamW.
    clip_norm: bound of the global gradient norm. moments: dtype of AdamW's moments and of Muon's momentum.
    muon_beta: of Muon's momentum; nesterov: whether it looks one step ahead. ns_steps: of Newton-Schulz. adjust: how
    an update grows with the matrix (`muon_step.size_factor`). sharding: whether ranks that hold the same parameters
    share out masters and moments: zero1 (`parallel.zero`), deepspeed, or none; auto: zero1 where there is more than one
    such rank.
    """

    schedule: LearningRateConfig
    kind: Kind = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    moments: Literal["bf16", "fp32"] = "bf16"
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    sharding: Sharding = "auto"
    muon_beta: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust: Adjust = "match_rms_adamw"

    def __post_init__(self) -> None:
        for name, needed in (("moments", "fp32"), ("kind", "adamw")):
            given = getattr(self, name)
            if self.sharding == "deepspeed" and given != needed:
                raise ValueError(
                    f"optimizer.sharding=deepspeed needs optimizer.{name}={needed} and it is {given}: use "
                    f"optimizer.{name}={needed}, or optimizer.sharding=auto"
                )
        if self.sharding == "deepspeed" and self.moments != "fp32":
            raise ValueError(
                f"optimizer.sharding=deepspeed keeps FP32 moments and optimizer.moments={self.moments}: use "
                "optimizer.moments=fp32, or optimizer.sharding=auto"
            )
        if self.weight_decay < 0.0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be at least 0: use 0 for none")
        for name, source in (("beta1", "DeepSeek-V3"), ("beta2", "DeepSeek-V3"), ("muon_beta", "Muon's author")):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1: {source} used "
                    f"{getattr(type(self), name)}"
                )
        for name in ("eps", "clip_norm"):
            if getattr(self, name) <= 0.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be above 0: use {getattr(type(self), name)}"
                )
        for name, legal in (("kind", get_args(Kind)), ("adjust", get_args(Adjust))):
            if (given := getattr(self, name)) not in legal:
                raise ValueError(f"optimizer.{name}={given!r} does not exist: use {' or '.join(legal)}")
        if self.ns_steps < 1:
            raise ValueError(f"optimizer.ns_steps={self.ns_steps} must be at least 1: use {type(self).ns_steps}")

    def grad_scale(self, grad_norm: float) -> float:
        """What gradients of the global norm `grad_norm` are multiplied by, so that it is at most `clip_norm`."""
        return min(1.0, self.clip_norm / (grad_norm + 1e-6))
