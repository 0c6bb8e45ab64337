"""What a forward does not keep for its backward, chosen by name (DeepSeek-V3 report, section 3.2.3).

norm     an RMSNorm keeps its input, which the residual stream or a latent keeps anyway, and neither output nor
         statistics. Whoever needs the output in backward (columns for a weight gradient, the router) recalls it.
mla_up   q, k and v are not kept: attention's backward has them computed again from the two latents.
swiglu   SwiGLU's output is computed again from its input. FP8 always does: there the input's FP8 copy is what is kept.

What is computed again is a pure function of what was kept, so on and off are bit-equal; a cast is repeated, not kept.
Nothing that routes, sends, counts or registers a weight gradient ever runs twice. `torch.utils.checkpoint` was refused
for that reason: it repeats whole regions, attention, router and the registering of weight gradients with them, and all
at once; here every repetition is a closure, held by the one consumer that needs the values and run when it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only plans with the names need not wait for torch
    from torch import Tensor


class Recompute(StrEnum):
    """One thing that a forward may leave out."""

    NORM = "norm"
    MLA_UP = "mla_up"
    SWIGLU = "swiglu"


DEFAULT = frozenset({Recompute.SWIGLU})
RECIPE = frozenset(Recompute)


@dataclass(frozen=True)
class Recallable:
    """A tensor on the tape, for the forward; `recall()` gives its values to the backward, kept or computed again.

    Who wants the backward to have them must hold on to `recall` alone: `tensor` is the memory to be let go.
    """

    tensor: Tensor
    recall: Callable[[], Tensor]


def kept(x: Tensor | Recallable) -> Recallable:
    """A plain tensor is recalled by keeping it."""
    if isinstance(x, Recallable):
        return x
    values = x.detach()
    return Recallable(x, lambda: values)
