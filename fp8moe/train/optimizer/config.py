"""The optimizer's constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8moe.train.lr import LearningRateConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's constants, and `schedule`: the learning rate along the run.

    clip_norm: bound of the global gradient norm. moments: dtype of both moments. sharding: how masters and moments are
    cut over the ranks with the same parameters.
    """

    schedule: LearningRateConfig
    beta1: float = 0.9
    beta2: float = 0.95
    moments: Literal["bf16", "fp32"] = "bf16"
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    sharding: Literal["auto", "none", "zero1", "deepspeed"] = "auto"

    def __post_init__(self) -> None:
        if self.sharding == "deepspeed" and self.moments != "fp32":
            raise ValueError(
                f"optimizer.sharding=deepspeed keeps FP32 moments and optimizer.moments={self.moments}: use "
                "optimizer.moments=fp32, or optimizer.sharding=auto"
            )
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
