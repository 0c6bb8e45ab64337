"""A phase: the unit that schedules move, with a small autograd graph of its own.

A transformer block is cut where it communicates. A compute phase is a `DetachedGraph`: its inputs are detached, its
outputs kept, so that its backward may run at any later time and in any order with other phases; only data ties them. A
communication phase starts a message and returns; whoever needs the message waits for it.

A backward is two products: dgrad, which the layer below needs at once, and wgrad, which nobody needs before the
optimizer. Zero-bubble and DualPipe schedules run them apart (arXiv 2401.10241). Every Linear hands its wgrad over with
`submit`: outside `DeferredWgrads.collect` it runs on the spot, which is ordinary training; inside it waits until the
phase's `wgrad` is called. Results are bit-equal: the same products, in the same order within a parameter. Hooks on
autograd nodes were refused: they can't tell the two products of one node apart.

Autograd's own graph over a whole block was refused for schedules: it runs a backward to its end once it has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Rest = TypeVar("Rest")
_collecting: list[Callable[[Callable[[], None]], None]] = []


def submit(wgrad: Callable[[], None]) -> None:
    """Run `wgrad` now, or leave it to the `DeferredWgrads` that collects. It must add into a `main_grad`."""
    if _collecting:
        _collecting[-1](wgrad)
    else:
        wgrad()


class DeferredWgrads:
    """Weight gradients of one phase of one micro-batch, put off; first in, first out."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within the block, every submitted weight gradient waits here.

        What collects is the process's, not the thread's: on a GPU autograd runs a backward in a thread of its own.
        """
        _collecting.append(self._waiting.append)
        try:
            yield
        finally:
            _collecting.pop()

    @torch.no_grad()
    def run(self) -> None:
        """Compute what waits, in the order in which it came, and forget it."""
        waiting, self._waiting = self._waiting, []
        for wgrad in waiting:
            wgrad()

    def __len__(self) -> int:
        return len(self._waiting)


class Phase(NamedTuple):
    """One of a block's phases for one micro-batch: what to call for its forward, backward and late weight gradient."""

    name: str
    kind: Literal["compute", "communication"]
    forward: Callable[[], None]
    backward: Callable[[], None]
    wgrad: Callable[[], None] | None = None


class Pass(Protocol):
    """One micro-batch's pass through one part of a model (a block, the embedding, the head), phase by phase.

    `phases` are in forward order, a backward calls them in reverse. `output` and `input_gradient` are read once, after
    the last phase of either direction; `backward_from` says where the output's gradient will come from, before the
    first phase that goes back. Between the two a pass keeps what its backward needs; a phase's `wgrad` needs the pass
    no more.
    """

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    @property
    def output(self) -> Tensor: ...

    @property
    def input_gradient(self) -> Tensor: ...

    def backward_from(self, gradient: Callable[[], Tensor]) -> None: ...


class DetachedGraph:
    """The autograd graph of a function that ran once on detached inputs; `outputs` are detached from it as well.

    The graph keeps what its backward needs, not the outputs: they live as long as `outputs`, which `take` empties.
    Under `torch.no_grad` there is no graph, and no backward.
    """

    def __init__(self, inputs: list[Tensor], outputs: tuple[Tensor, ...], wgrads: DeferredWgrads) -> None:
        self._inputs, self._wgrads = inputs, wgrads
        self._edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        self.outputs = tuple(y.detach() for y in outputs)

    def take(self) -> tuple[Tensor, ...]:
        """The outputs, handed over: the graph forgets them."""
        outputs, self.outputs = self.outputs, ()
        return outputs

    def backward(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """One gradient an output, None where there is none -> one an input (None where no output depends on it).

        Weight gradients of Linears wait in the graph's `DeferredWgrads`.
        """
        given = [(edge, dy) for edge, dy in zip(self._edges, grads, strict=True) if edge is not None and dy is not None]
        with self._wgrads.collect():
            torch.autograd.backward([edge for edge, _ in given], [dy for _, dy in given])
        inputs, self._inputs, self._edges = self._inputs, [], []
        return tuple(x.grad for x in inputs)


def run_detached(
    function: Callable[..., tuple[tuple[Tensor, ...], Rest]], *inputs: Tensor, wgrads: DeferredWgrads
) -> tuple[DetachedGraph, Rest]:
    """Call `function`, which gives (outputs, anything else), on detached `inputs` -> its graph, and anything else."""
    detached = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs, rest = function(*detached)
    return DetachedGraph(detached, outputs, wgrads), rest
