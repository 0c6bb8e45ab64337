"""The optimizer of a run: flat buffers of masters and weights, cut into shards, each updated by AdamW or Muon.

The weights that a forward reads are BF16 copies, rounded from the masters within each update; in FP32 the parameter is
its own master. Buffers lie in the order of the flat gradients, and parameters become views of them. Writing each
parameter through a table of addresses was refused, views are what gradients are already, and a shard of a flat buffer
is a slice.

Where a parameter has no other replica, or nothing is shared out, a shard is a whole buffer. Under ZeRO-1 it is this
rank's part of a bucket, and the weights leave as soon as the bucket is updated (`parallel.sharding.zero`). Muon's and
AdamW's parameters within either are shards of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.layers.linear import MainGrads, QuantizedWeight, is_expert, matrices
from fp8moe.parallel.sharding.buckets import Matrices, no_matrices
from fp8moe.parallel.sharding.zero import ShardedBucket, Zero1
from fp8moe.train.optimizer.adamw import AdamWUpdate
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.muon import MuonUpdate
from fp8moe.train.optimizer.state import Held, Moment, Shard, flat_weights, part, whole


class Update(Protocol):
    """What updates a shard. tensors: [n] each, what it keeps beside the master, by kind."""

    shard: Shard
    tensors: dict[str, Tensor]

    def step(self, at: Moment) -> None: ...


class Optimizer:
    """Updates the parameters of `model`, which must have been initialised, from their `main_grad` in `main_grads`.

    They become views of flat buffers. zero: what shards them among replicas; None where each rank keeps all of its own.
    `updates` counts updates done: the bias correction's step, which a skipped step doesn't advance. `held`: what this
    rank keeps, by canonical name.
    """

    def __init__(
        self, model: nn.Module, main_grads: MainGrads, config: OptimizerConfig, zero: Zero1 | None = None
    ) -> None:
        self.config, self._zero = config, zero
        self.updates = 0
        named = {p: name for name, p in model.named_parameters()}
        self._fp8 = {m.weight: m for m in model.modules() if isinstance(m, QuantizedWeight) and m.recipe.fp8}
        self._groups: list[tuple[list[Update], ShardedBucket | None]] = []
        for grad, expert in ((main_grads.dense, False), (main_grads.expert, True)):
            parameters = [p for p in named if is_expert(p) is expert]
            if zero is None or not zero.is_sharded(grad):
                self._groups.append((self._updates(whole(parameters, grad), is_whole=True), None))
                continue
            weights = flat_weights(parameters, grad)
            for one in (one for one in zero.buckets if one.grad is grad):
                one.weight = weights
                self._groups.append((self._updates(part(one.owned, one.bounds, grad, weights), is_whole=False), one))
        self._names = named
        self.held = self._by_name(
            (update.shard, {"master": update.shard.master, **update.tensors}) for update in self._all()
        )

    def _updates(self, shard: Shard, *, is_whole: bool) -> list[Update]:
        """is_whole: FP8 blocks are written with the update, not behind an all-gather."""
        made: list[Update] = []
        for run, is_muons in shard.runs(self._is_muons):
            quantized = [self._fp8[s.parameter] for s in run.spans if is_whole and s.parameter in self._fp8]
            kind: Callable[[Shard, OptimizerConfig, Sequence[QuantizedWeight]], Update]
            kind = MuonUpdate if is_muons else AdamWUpdate
            made.append(kind(run, self.config, quantized))
        return made

    def _is_muons(self, parameter: Parameter) -> bool:
        return self.config.kind == "muon" and bool(matrices(parameter))

    def _all(self) -> list[Update]:
        return [update for updates, _ in self._groups for update in updates]

    def masters(self) -> list[Tensor]:
        """The FP32 masters that this rank holds, [n] a shard."""
        return [update.shard.master for update in self._all()]

    def named(self, kind: str, of_shards: Sequence[Tensor]) -> dict[str, list[Held]]:
        """Tensors that go with `masters`, one a shard, cut by parameter as `held` is; `kind` is what they are."""
        shards = (update.shard for update in self._all())
        return self._by_name((shard, {kind: flat}) for shard, flat in zip(shards, of_shards, strict=True))

    def _by_name(self, shards: Iterable[tuple[Shard, dict[str, Tensor]]]) -> dict[str, list[Held]]:
        found: dict[str, list[Held]] = {name: [] for name in self._names.values()}
        for shard, kinds in shards:
            for held in shard.held(kinds):
                found[self._names[held.parameter]].append(held)
        return found

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it.

        Weights, masters and state change, and the FP8 blocks of the weights that have some; those of sharded buffers
        when `Zero1` has brought them. Nothing waits for the device.
        """
        self.updates += 1
        scale = self._all()[0].shard.master.new_full((), self.config.grad_scale(grad_norm))
        at = Moment(lr, self.updates, scale)
        for updates, bucket in self._groups:
            for update in updates:
                update.step(at)
            if bucket is not None and self._zero is not None:
                self._zero.start_gather(bucket)

    @contextmanager
    def reading(self, of_shards: Sequence[Tensor]) -> Iterator[None]:
        """Within the block parameters and FP8 blocks are those of other masters, FP32 on any device, one a shard.

        Afterwards they are the same bits as before, as are the masters. Collective where sharded.
        """
        kept = [update.shard.own_masters() for update in self._all()]
        self._write(of_shards)
        try:
            yield
        finally:
            self._write([master if own is None else own for master, own in zip(self.masters(), kept, strict=True)])

    def write_parameters(self) -> None:
        """Round the masters, after they were loaded, into parameters and FP8 blocks. Collective where sharded."""
        self._write(self.masters())

    @torch.no_grad()
    def _write(self, of_shards: Sequence[Tensor]) -> None:
        values = iter(of_shards)
        for updates, bucket in self._groups:
            for update in updates:
                update.shard.write(next(values))
            if bucket is not None and self._zero is not None:
                self._zero.start_gather(bucket)
                continue
            for parameter in {span.parameter for update in updates for span in update.shard.spans} & self._fp8.keys():
                self._fp8[parameter].quantize()
        if self._zero is not None:
            self._zero.wait_weights()


def whole_matrices(config: OptimizerConfig) -> Matrices:
    """What a part of a bucket may not cut."""
    if config.kind != "muon":
        return no_matrices
    return lambda parameter: [(matrix.start, matrix.stop) for matrix in matrices(parameter)]
