"""The precision recipe of a model: what is stored in what, and what the matrix products of a Linear see.

FP32   parameters, activations and products in FP32: the layout tests' and the oracle's choice.
BF16   parameters and activations in BF16, products summed in FP32, gradients gathered in FP32 `main_grad`.
FP8    as BF16, and every product of every Linear and expert Linear takes E4M3 operands with fine-grained scales
       (DeepSeek-V3 report, section 3.3). Embedding, head, router gate, norms and attention itself stay as in BF16.
"""

from __future__ import annotations

from enum import StrEnum

import torch


class Precision(StrEnum):
    """One word that switches a whole model."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return torch.float32 if self is Precision.FP32 else torch.bfloat16

    @property
    def unquantized(self) -> Precision:
        """What the parts of a model that FP8 leaves alone compute in."""
        return Precision.BF16 if self is Precision.FP8 else self
