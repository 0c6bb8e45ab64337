"""The name map of a family, as data: of each canonical parameter the tensors of a directory that make it up.

A parameter [.., N, K] is read as one matrix of its rows [R, K], experts below each other (a vector [N] as [N, 1]). Each
of its sources gives the next rows of it. A source is a tensor of the directory, or one expert's matrix of it, whose
rows may stand in another order there (`RowOrder`). Both directions use the same map, so what an import joins an export
takes apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """Where the rows of a parameter stand in a matrix of the directory.

    heads: rows are heads of `size` features, of which there the first `rotary` are rotated in halves (i, i + rotary/2);
    here the others come first, then the rotated ones in pairs (2i, 2i + 1). strided: they are every `size`-th row from
    `first` on (GPT-OSS has gate and up in turn).
    """

    kind: Literal["heads", "strided"]
    size: int
    rotary: int = 0
    first: int = 0

    def index(self, rows: int) -> Tensor:
        """int64 [rows]: row i of the parameter is row index[i] there."""
        if self.kind == "strided":
            return torch.arange(rows) * self.size + self.first
        half = self.rotary // 2
        rotated = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1).flatten()
        head = torch.cat([torch.arange(self.rotary, self.size), rotated])
        return (torch.arange(rows // self.size)[:, None] * self.size + head).flatten()


@dataclass(frozen=True)
class Source:
    """The next `rows` rows of a parameter: where they are in the directory.

    shape: of the whole tensor there. expert: which of the matrices stacked in it. transposed: the matrix is [K, N]
    there. order: of its rows, None for the same.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    expert: int | None = None
    transposed: bool = False
    order: RowOrder | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the tensor's own rows are these, in order."""
        return self.order is None and not self.transposed


@dataclass(frozen=True)
class Parameter:
    """A canonical parameter, or the balancing bias of a router: its shape with all experts, and its sources.

    linear: a weight that FP8 training multiplies in FP8. is_flat: its last dimension counts as rows.
    Without sources it is zeros (the bias of a router without).
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    linear: bool = False
    is_bias: bool = False
    is_flat: bool = False

    @property
    def columns(self) -> int:
        return 1 if len(self.shape) == 1 or self.is_flat else self.shape[-1]

    @property
    def length(self) -> int:
        return prod(self.shape)

    @property
    def stored_name(self) -> str:
        """Under which a checkpoint holds its FP32 values."""
        return f"bias.{self.name}" if self.is_bias else f"master.{self.name}"


def vector(name: str, source: str, size: int) -> Parameter:
    """A norm's gain, or another vector."""
    return Parameter(name, (size,), (Source(source, (size,), size),))


def matrix(name: str, sources: list[tuple[str, int]], columns: int, *, linear: bool = True) -> Parameter:
    """A weight whose rows are those of `sources` (name, rows), one below another."""
    parts = tuple(Source(source, (rows, columns), rows) for source, rows in sources)
    return Parameter(name, (sum(rows for _, rows in sources), columns), parts, linear)


def experts(
    name: str, num_experts: int, columns: int, sources: Callable[[int], list[tuple[str, int]]], fused: str | None
) -> Parameter:
    """The stacked weights of experts: of each its own tensors, or all from one tensor `fused` [E, N, K]."""
    rows = sum(rows for _, rows in sources(0))
    shape = (num_experts, rows, columns)
    if fused is not None:
        return Parameter(name, shape, tuple(Source(fused, shape, rows, e) for e in range(num_experts)), linear=True)
    parts = [Source(source, (n, columns), n) for e in range(num_experts) for source, n in sources(e)]
    return Parameter(name, shape, tuple(parts), linear=True)
