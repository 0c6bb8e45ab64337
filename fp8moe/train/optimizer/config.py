"""The optimizers' constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8moe.limits import Range, check_fields
from fp8moe.train.lr import LearningRateConfig

# Above it a moment in BF16 (8 bits, rounded to nearest) never falls when gradients vanish. The largest relative step
# between neighbours is from 1 + 2^-7 down to 1, and beta x 129/128 rounds to 1 where 129/128 x (1 - beta) is at least
# half of that step, 2^-8: where 1 - beta >= 1/258 (a tie goes to the even 1). A larger beta stays at 129/128 for good.
MOST_BF16_BETA = 1 - 1 / 258
Kind = Literal["adamw", "muon"]
Sharding = Literal["auto", "none", "zero1", "deepspeed"]
Adjust = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its constants, and the learning rate along the run."""

    schedule: LearningRateConfig  # the learning rate along the run
    # adamw, or muon, which updates the matrices of hidden layers and leaves the other parameters to AdamW
    kind: Kind = "adamw"
    beta1: float = 0.9  # of AdamW's first moment, an average of gradients
    beta2: float = 0.95  # of AdamW's second moment, an average of squared gradients
    moments: Literal["bf16", "fp32"] = "bf16"  # dtype of AdamW's moments and of Muon's momentum
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, times the learning rate
    clip_norm: float = 1.0  # bound of the global gradient norm
    # masters and moments shared out over ranks that hold the same parameters: zero1 (`parallel.sharding.zero`),
    # deepspeed or none; auto: zero1 where there is more than one such rank
    sharding: Sharding = "auto"
    muon_beta: float = 0.95  # of Muon's momentum
    nesterov: bool = True  # Muon's momentum looks one step ahead
    ns_steps: int = 5  # of Muon's Newton-Schulz iteration
    # how Muon's update grows with the matrix (`muon_step.size_factor`): as large as AdamW's, or the original's,
    # which needs another peak
    adjust: Adjust = "match_rms_adamw"

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optimizer",
            beta1=Range(least=0, below=1, use="DeepSeek-V3 used 0.9"),
            beta2=Range(least=0, below=1, use="DeepSeek-V3 used 0.95"),
            eps=Range(above=0, most=1),
            weight_decay=Range(least=0, most=100, use="use 0 for none"),
            clip_norm=Range(above=0, most=1e30),  # large ones switch clipping off
            muon_beta=Range(least=0, below=1, use="Muon's author used 0.95"),
            ns_steps=Range(least=1, most=100),
        )
        for name, needed in (("moments", "fp32"), ("kind", "adamw")):
            given = getattr(self, name)
            if self.sharding == "deepspeed" and given != needed:
                raise ValueError(
                    f"optimizer.sharding=deepspeed needs optimizer.{name}={needed} and it is {given}: use "
                    f"optimizer.{name}={needed}, or optimizer.sharding=auto"
                )
        self._check_rounding()

    def _check_rounding(self) -> None:
        if self.moments == "fp32":
            return
        for name in ("beta1", "beta2", *(["muon_beta"] if self.kind == "muon" else [])):
            if (beta := getattr(self, name)) > MOST_BF16_BETA:
                raise ValueError(
                    f"optimizer.{name}={beta} is too close to 1 for BF16 moments, of which {1 - beta:.2g} is rounded "
                    f"away, so that they never fall: use optimizer.moments=fp32, or optimizer.{name}=0.99 "
                    f"(at most {MOST_BF16_BETA:.5f})"
                )

    def grad_scale(self, grad_norm: float) -> float:
        """What gradients of the global norm `grad_norm` are multiplied by, so that it is at most `clip_norm`."""
        return min(1.0, self.clip_norm / (grad_norm + 1e-6))
