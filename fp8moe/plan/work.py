"""Pieces of work of a step: products, passes over memory, attention; how long they take is said elsewhere.

A piece is a pure count: sizes, bytes or FLOPs of one micro-batch on one rank. `rates` turns it into seconds on a card.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Product:
    """`groups` products [m, k] by [n, k]; columns: a weight gradient, added into FP32, k being tokens of one group."""

    m: int
    n: int
    k: int
    groups: int = 1
    columns: bool = False
    fp8: bool = False
    grouped: bool = False

    @property
    def flops(self) -> float:
        """Multiply-adds counted as two."""
        return 2.0 * self.groups * self.m * self.n * self.k


@dataclass(frozen=True)
class Pass:
    """A kernel bound by memory: bytes read and written; `kernel` names what it reaches (`rates.SHARES`)."""

    kernel: str
    kind: str  # under which its time is reported: casts, norms and rotation, ...
    bytes: float


@dataclass(frozen=True)
class Attention:
    """Core attention's products: FLOPs, and how many tiles of 128 queries and heads there are to share out."""

    flops: float
    tiles: float


@dataclass(frozen=True)
class Small:
    """Kernels that move next to nothing (routing, counts, copies of scalars): their launches are what they cost."""

    launches: int


@dataclass(frozen=True)
class Shared:
    """A piece that each of `ranks` ranks computes for the tokens of all of them: what is not its own is redundant."""

    piece: Product | Pass
    ranks: int


Piece = Product | Pass | Attention | Small | Shared


@dataclass
class BlockWork:
    """A block's pieces of compute on one micro-batch, by the phases of a pass (`model.phases`): F, B and W of each.

    What dispatch and combine compute beside their messages stands in the phase that waits for it or starts it. keys:
    before the gather, where ranks share sequences (`model.context_phases`); queries: the beginning of attn's forward,
    which does not wait for it; shared: the shared experts, with which mlp begins before it waits for a message.
    """

    keys: dict[str, list[Piece]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
    queries: dict[str, list[Piece]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
    attn: dict[str, list[Piece]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
    shared: dict[str, list[Piece]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
    mlp: dict[str, list[Piece]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
