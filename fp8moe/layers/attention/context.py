"""Context parallelism in attention: queries of a part of every sequence, keys of the whole of it.

A rank holds a zigzag part of each sequence (`zigzag`) and everything but attention works on tokens alone. Attention
gathers what keys and values are made of: latents where there are any (MLA: 576 values a token in DeepSeek-V3, and not
128 heads of keys and values), else keys and values of the few key heads (GQA). Each rank makes the keys of all tokens.
Going back it has a share of the gradient of everything that was gathered; shares travel in the dtype of activations and
are added in FP32, in the order of the ranks. Ring attention was refused: on keys and values it moves 71 times the bytes
of MLA's latents and as many as GQA's, in cp - 1 messages with a kernel behind each, whose outputs are merged by
log-sum-exps that PyTorch's fused kernels don't all give. It would save the room for whole keys.

`Local` is what a layer makes of its own tokens before the gather, `Whole` what it reads of all tokens behind it. The
exchange between the two is a message: in a schedule a phase of its own (`model.context_phases`), under ordinary
autograd `gathered`, which waits where the schedule would. Both give equal bits.

Legend: B sequences, S tokens of a sequence, T = B x S, t = T / cp tokens of a rank, n features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.zigzag import chunks_of
from fp8moe.layers.dispatch import Handle
from fp8moe.layers.operand import Rows, placeholder


class ContextExchange(Protocol):
    """The messages between the `size` ranks that share sequences; this one is `rank`."""

    rank: int
    size: int

    def gather(self, rows: Sequence[Rows], num_sequences: int) -> Handle[tuple[Rows, ...]]:
        """Of each the rows [t, n] of this rank -> those of all tokens [T, n]; FP8 rows have power-of-two scales."""
        ...

    def scatter(self, shares: Sequence[Tensor], num_sequences: int) -> Handle[tuple[Tensor, ...]]:
        """Of each this rank's share [T, n] of a sum over ranks -> the sum for the rank's own tokens [t, n]."""
        ...

    def total(self, x: Tensor) -> Handle[Tensor]:
        """A copy of a small tensor, summed over ranks."""
        ...


@dataclass(frozen=True)
class Run:
    """A chunk of a sequence: queries of neighbouring tokens and the keys before and among them, of whole documents.

    queries: of the rank's tokens [t]. keys: of all tokens [T]; they begin with the document of the first query. Each
    document, or part of one, has as many queries and keys as the two lists say; its last query sees its last key.
    """

    queries: slice
    keys: slice
    query_parts: Documents
    key_parts: Documents


@dataclass(frozen=True)
class Context:
    """The whole sequences behind a rank's tokens. cos, sin [T, rope_dim/2]: rotations of all their tokens."""

    exchange: ContextExchange
    num_sequences: int
    cos: Tensor
    sin: Tensor
    documents: Documents | None

    @property
    def seq_len(self) -> int:
        """Tokens of a whole sequence."""
        return self.cos.shape[0] // self.num_sequences

    @functools.cached_property
    def places(self) -> Tensor:
        """Where in its sequence each token of the rank's part stands, int64 [S / cp]."""
        rank, cp = self.exchange.rank, self.exchange.size
        size = self.seq_len // (2 * cp)
        return torch.cat(
            [torch.arange(chunk * size, (chunk + 1) * size, device=self.cos.device) for chunk in chunks_of(rank, cp)]
        )

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """The rank's chunks, sequence after sequence, in the order of its tokens."""
        rank, cp = self.exchange.rank, self.exchange.size
        lengths = (self.seq_len,) * self.num_sequences if self.documents is None else self.documents.lengths
        ends = torch.tensor(lengths).cumsum(0).tolist()
        size, found = self.seq_len // (2 * cp), list[Run]()
        for sequence in range(self.num_sequences):
            for chunk in chunks_of(rank, cp):
                start = sequence * self.seq_len + chunk * size
                parts = _parts(lengths, ends, start, start + size)
                queries, keys = ([part[i] for part in parts] for i in (0, 1))
                found.append(
                    Run(
                        slice(len(found) * size, (len(found) + 1) * size),
                        slice(start + size - sum(keys), start + size),
                        Documents(tuple(queries), self.cos.device),
                        Documents(tuple(keys), self.cos.device),
                    )
                )
        return tuple(found)

    @functools.cached_property
    def query_parts(self) -> Documents:
        """The queries of each document of each run."""
        return _all((run.query_parts for run in self.runs), self.cos.device)

    @functools.cached_property
    def key_parts(self) -> Documents:
        """Their keys, in the order of `by_run`."""
        return _all((run.key_parts for run in self.runs), self.cos.device)

    def by_run(self, x_TH: Tensor) -> Tensor:
        """Keys or values [T, H, d] -> those of each run, one after the other; what two runs read is there twice."""
        return torch.cat([x_TH[run.keys] for run in self.runs])


def _all(parts: Iterable[Documents], device: torch.device) -> Documents:
    return Documents(tuple(length for one in parts for length in one.lengths), device)


def _parts(lengths: Sequence[int], ends: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """(queries, keys) of each document that has tokens in [start, stop), whose keys begin with the document."""
    found = []
    for length, end in zip(lengths, ends, strict=True):
        if end > start and end - length < stop:
            begin, last = end - length, min(end, stop)
            found.append((last - max(begin, start), last - begin))
    return found


@dataclass(frozen=True)
class Local:
    """What a layer makes of a rank's own tokens [t, ...], before the gather.

    own     stay here, followed by autograd
    shared  the same of what is gathered: each tensor [t, n], or a placeholder of it
    rows    what is sent of them, their values
    state   what else the layer wants back, and nobody else reads
    """

    own: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    rows: tuple[Rows, ...]
    state: Any = None


@dataclass(frozen=True)
class Whole:
    """Of all tokens [T, n] what was gathered: `rows`, and `handles`, which autograd follows, in their place."""

    handles: tuple[Tensor, ...]
    rows: tuple[Rows, ...]


Arrive = Callable[[], Whole]  # waits for the gather; called when a layer has nothing else to do


def leaves(rows: Sequence[Rows]) -> Whole:
    """What has arrived, at the beginning of a graph: the handles are its leaves, placeholders of FP8 rows."""
    like = next(x for x in rows if isinstance(x, Tensor))
    handles = (placeholder(x.shape, like) if isinstance(x, Fp8Tensor) else x for x in rows)
    return Whole(tuple(handle.detach().requires_grad_() for handle in handles), tuple(rows))


def gathered(local: Local, context: Context) -> Arrive:
    """Start the gather under ordinary autograd."""
    message = context.exchange.gather(local.rows, context.num_sequences)

    def arrive() -> Whole:
        rows = message.wait()
        handles = _GatherFunction.apply(rows, context, *local.shared)
        return Whole(handles, rows)

    return arrive


class _GatherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Sequence[Rows], context: Context, *shared: Tensor) -> tuple[Tensor, ...]:
        ctx.context = context
        return tuple(handle.detach() for handle in leaves(rows).handles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.context.exchange.scatter(grads, ctx.context.num_sequences).wait()
