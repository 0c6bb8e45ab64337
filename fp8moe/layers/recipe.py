"""The recipe of a model: in what precision it stores and multiplies, and what its backward computes again.

Precision
    fp32   parameters, activations and products in FP32: the layout tests' and the oracle's choice
    bf16   parameters and activations in BF16, products summed in FP32, gradients gathered in FP32 `main_grad`
    fp8    as bf16, and every product of every Linear and expert Linear takes E4M3 operands with fine-grained scales
           (DeepSeek-V3 report, section 3.3); embedding, head, router gate, norms and attention itself stay in BF16
Scales of FP8 (`Scales`): whether they are powers of two
    recipe         where they travel (dispatched activations, gradients sent back, gathered latents), for inputs of `o`
                   and of gate + up, and where columns are made of rows or of 12 bits; FP32 everywhere else
    fp32           FP32 wherever the format allows; not where scales travel, a byte each, and not in columns made of FP8
                   rows (requantized, SwiGLU's) or of E5M6, which a power of two makes nearly exact
    power_of_two   everywhere, weights and gradients included: on a CPU one BF16 product then does (`kernels/README.md`)
Recomputation (the report's section 3.2.3): what a forward does not keep for its backward
    norm     an RMSNorm keeps its input, which the residual stream or a latent keeps anyway, and its 1/rms, not its
             output; whoever needs that in backward (columns for a weight gradient, the router) has it made again
    mla_up   q, k and v are not kept: attention's backward has them computed again from the two latents, and where there
             are none (grouped queries) from the normed input of their projection
    swiglu   SwiGLU's output is computed again from its input; FP8 always does, it keeps the input's FP8 copy
On and off are bit-equal: what is computed again is a pure function of what was kept.

A constructor takes the recipe whole. The device is not part of it: build under `with torch.device(...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only plans with the names need not wait for torch
    import torch


class Precision(StrEnum):
    """Precision of a whole model."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        import torch

        return torch.float32 if self is Precision.FP32 else torch.bfloat16

    @property
    def unquantized(self) -> Precision:
        """Precision of the parts that FP8 leaves alone."""
        return Precision.BF16 if self is Precision.FP8 else self


class Scales(StrEnum):
    """Which scales of FP8 tensors are powers of two; the others are FP32."""

    RECIPE = "recipe"
    FP32 = "fp32"
    POWER_OF_TWO = "power_of_two"


class Recompute(StrEnum):
    """One thing that a forward may leave out."""

    NORM = "norm"
    MLA_UP = "mla_up"
    SWIGLU = "swiglu"


DEFAULT_RECOMPUTE = frozenset({Recompute.SWIGLU})
FULL_RECOMPUTE = frozenset(Recompute)


@dataclass(frozen=True)
class Recipe:
    """Precision, recomputation and scales of a model, whether keys are gathered; every layer is built from it."""

    precision: Precision
    recompute: frozenset[Recompute] = DEFAULT_RECOMPUTE
    scales: Scales = Scales.RECIPE
    gathered: bool = False  # keys come from the ranks that share a sequence: their latents travel

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return self.precision.dtype

    @property
    def fp8(self) -> bool:
        """Whether Linears multiply FP8 operands."""
        return self.precision is Precision.FP8

    def power_of_two(self, usual: bool) -> bool:
        """Whether a cast has power-of-two scales, where the recipe says `usual`; for casts that may have either."""
        return usual if self.scales is Scales.RECIPE else self.scales is Scales.POWER_OF_TWO

    @property
    def unquantized(self) -> Recipe:
        """The recipe of the parts that FP8 leaves alone."""
        return replace(self, precision=self.precision.unquantized)
