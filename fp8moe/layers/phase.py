"""A phase: the unit that schedules move about, with a small autograd graph of its own.

A transformer block is cut where it communicates. A compute phase is an `Island`: its inputs are detached, its outputs
kept, so that its backward may run at any later time and in any order with other phases; only data ties them. A
communication phase starts a message and returns; whoever needs the message waits for it. Weight gradients of a phase
wait in a `WeightGradStore` until its `wgrad` is called.

Autograd's own tape over a whole block was refused for schedules: it runs a backward to its end once it has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fp8moe.layers.wgrad import WeightGradStore


@dataclass(frozen=True)
class Phase:
    """One of a block's phases for one micro-batch: what to call for its forward, backward and late weight gradient."""

    name: str
    kind: Literal["compute", "communication"]
    forward: Callable[[], None]
    backward: Callable[[], None]
    wgrad: Callable[[], None] | None = None


class Run(Protocol):
    """One micro-batch's way through one part of a model (a block, the embedding, the head), phase by phase.

    `phases` are in forward order, a backward calls them in reverse. `output` and `input_gradient` are read once, after
    the last phase of either way; `backward_from` says where the output's gradient will come from, before the first
    phase that goes back. Between the two a run keeps what its backward needs; a phase's `wgrad` needs the run no more.
    """

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    @property
    def output(self) -> Tensor: ...

    @property
    def input_gradient(self) -> Tensor: ...

    def backward_from(self, gradient: Callable[[], Tensor]) -> None: ...


class Island:
    """A function of tensors run once, with its own graph: `values` are its outputs, cut off from it.

    The graph keeps what its backward needs, not the outputs: they live as long as `values`, which `take` empties. Under
    `torch.no_grad` there is no graph, and no backward. `backward` gives the gradients of the inputs (None for inputs
    that no output depends on); weight gradients of Linears go to `store` under `key`.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, store: WeightGradStore, key: Hashable
    ) -> None:
        self._inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        self._store, self._key = store, key
        outputs = function(*self._inputs)
        self._edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        self.values = tuple(y.detach() for y in outputs)

    def take(self) -> tuple[Tensor, ...]:
        """The outputs, handed over: the island forgets them."""
        values, self.values = self.values, ()
        return values

    def backward(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """One gradient an output, None where there is none -> one an input."""
        given = [(edge, dy) for edge, dy in zip(self._edges, grads, strict=True) if edge is not None and dy is not None]
        with self._store.collect(self._key):
            torch.autograd.backward([edge for edge, _ in given], [dy for _, dy in given])
        inputs, self._inputs, self._edges = self._inputs, [], []
        return tuple(x.grad for x in inputs)
