"""The stages of a model that a rank decodes with, and what passes between the ranks of a pipeline while it does.

A rank with the whole model has one stage and nothing to send. In a pipeline hidden states go from stage to stage by
the links of training, and what the head's rank draws goes to all ranks, each of which keeps the same account of rows.
Rows are dealt out to as many sets as the pipeline has ranks. While one set is at the head another is at the
embedding: a rank works on the sets in turn and waits for a set's tokens only when its turn comes, so after the first
token every rank has work. A pipeline that goes both ways is used in its first direction.

Legend: T new tokens, D model, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.collectives import PendingBroadcast, start_broadcast
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.run import Run
from fp8moe.train.step import training_schedule


@dataclass(frozen=True)
class LocalStage:
    """Blocks `layers`, behind the embedding or before the head where it has them.

    source, target: pipeline ranks of the stages before and behind; None: this rank, or there is none.
    """

    layers: range
    embedding: bool
    head: bool
    source: int | None = None
    target: int | None = None


class Stages(Protocol):
    """The stages of this rank, in order, and its messages. sets: of rows that are in flight at once."""

    @property
    def local(self) -> Sequence[LocalStage]: ...

    @property
    def sets(self) -> int: ...

    def receive(self, stage: LocalStage, tokens: int) -> Tensor:
        """The hidden states [T, D] of the stage before."""
        ...

    def send(self, stage: LocalStage, hidden_TD: Tensor) -> None:
        """Hand on what the stage computed."""
        ...

    def share(self, drawn_2N: Tensor) -> None:
        """Give all ranks what the head's rank has drawn, FP64 [2, N]."""
        ...

    def drawn(self, rows: int) -> Tensor:
        """What it has drawn, [2, N], for a rank without the head. Sets take turns in one order on all ranks."""
        ...

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        ...


class WholeModel:
    """One rank, all blocks, no message."""

    sets = 1

    def __init__(self, model: Transformer) -> None:
        self.local = (LocalStage(range(model.config.num_layers), embedding=True, head=True),)

    def receive(self, stage: LocalStage, tokens: int) -> Tensor:
        raise AssertionError("a whole model has no stage before")

    def send(self, stage: LocalStage, hidden_TD: Tensor) -> None:
        raise AssertionError("a whole model has no stage behind")

    def share(self, drawn_2N: Tensor) -> None:
        """Nothing: nobody else needs it."""

    def drawn(self, rows: int) -> Tensor:
        raise AssertionError("a whole model draws itself")

    def finish(self) -> None:
        """Nothing was sent."""


class PipelineStages:
    """A rank of a pipeline. placement: the pipeline rank that computes each of `stages`."""

    def __init__(
        self, model: Transformer, stages: Sequence[Stage], placement: Sequence[int], links: Links, mesh: Mesh
    ) -> None:
        self._links, self._mesh, self._dim = links, mesh, model.config.dim
        self._dtype, self._device = model.recipe.dtype, next(model.parameters()).device
        self._head = placement[-1] * mesh.dp + mesh.dp_rank
        self._pending: list[PendingBroadcast] = []
        self.sets = mesh.pp

        def elsewhere(index: int) -> int | None:
            rank = placement[index] if 0 <= index < len(stages) else mesh.pp_rank
            return None if rank == mesh.pp_rank else rank

        self.local = tuple(
            LocalStage(one.layers, one.embedding, one.head, elsewhere(one.index - 1), elsewhere(one.index + 1))
            for one in stages
            if placement[one.index] == mesh.pp_rank
        )
        self._handed: list[Tensor] = []

    def receive(self, stage: LocalStage, tokens: int) -> Tensor:
        if stage.source is None:  # the stage before is on this rank
            return self._handed.pop(0)
        buffer = torch.empty(tokens, self._dim, dtype=self._dtype, device=self._device)
        return self._links.receive(buffer, stage.source, "hidden states (decoding)").wait()

    def send(self, stage: LocalStage, hidden_TD: Tensor) -> None:
        if stage.target is None:
            self._handed.append(hidden_TD)
        else:
            self._links.send(hidden_TD, stage.target, "hidden states (decoding)")

    def share(self, drawn_2N: Tensor) -> None:
        assert self._mesh.pp_group is not None
        self._pending = [one for one in self._pending if not one.is_done]
        self._pending.append(start_broadcast(drawn_2N, self._head, self._mesh.pp_group, "drawn tokens"))

    def drawn(self, rows: int) -> Tensor:
        assert self._mesh.pp_group is not None
        buffer = torch.empty(2, rows, dtype=torch.float64, device=self._device)
        return start_broadcast(buffer, self._head, self._mesh.pp_group, "drawn tokens").wait()

    def finish(self) -> None:
        for one in self._pending:
            one.wait()
        self._pending = []
        self._links.finish()


def stages_of(run: Run) -> PipelineStages | None:
    """Those of a rank that trains, in the first direction of its schedule; None where it has the whole model."""
    if run.mesh.pp == 1:
        return None
    placement = training_schedule(run, run.config.num_microbatches).placement[0]
    return PipelineStages(run.model, run.stages, placement, run.links, run.mesh)
