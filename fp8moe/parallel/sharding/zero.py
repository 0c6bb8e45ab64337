"""ZeRO-1 (arXiv 1910.02054): every replica of a parameter updates one part of it.

    a bucket's last W     its gradients are summed to the owners of its parts (reduce-scatter), beside the backward
    the update            each rank updates its parts: master and moments exist once
    behind it             the owners' BF16 weights go to all (all-gather), beside the next step's data and forward
    a pass's forward      waits for its own weights, and makes their FP8 blocks, once a step

A rank sends 4 bytes a parameter of gradients and 2 of BF16 weights, each times (W-1)/W; an all-reduce sends 8 of
gradients. Messages run on a stream of their own, one after another in an order that all ranks of a group know from the
schedule: the order in which the last of them is ready. Both ranks of a mirrored stage are replicas like any other.

The sum of squares for the clip norm is taken of each part when its sum arrives, so no pass over the gradients is spent
on it; each parameter is owned once in the world, so one sum over all ranks is the norm of all.

A buffer whose parameters have no other replica (experts at edp = 1) is left as it is: its gradients are final.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.layers.linear import MainGrads, QuantizedWeight, is_expert
from fp8moe.parallel.collectives import all_gather, all_reduce_in_message, reduce_scatter
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.sharding.buckets import Bucket, Matrices, Span, make_buckets, no_matrices
from fp8moe.parallel.stream import Pending, Stream
from fp8moe.profile.spans import REPLICAS
from fp8moe.schedule.action import Schedule

Value = TypeVar("Value")
Place = tuple[int, int]  # a pass: its stage, and its place in the stage's list


@dataclass(eq=False)
class ShardedBucket:
    """A bucket of one flat gradient buffer, with the group that shares it and the passes that feed it.

    weight: the buffer of the parameters themselves, of the same layout as grad, once an optimizer has made it.
    """

    bucket: Bucket
    grad: Tensor
    group: ProcessGroup
    feeds: frozenset[Place]
    weight: Tensor | None = None
    reduction: Pending[Tensor, Tensor] | None = field(default=None, repr=False)
    gathering: Pending[None, None] | None = field(default=None, repr=False)

    @property
    def bounds(self) -> tuple[int, int]:
        """(start, stop) of this rank's part in the buffer."""
        return self.bucket.parts[self.group.rank()]

    @property
    def owned(self) -> list[Span]:
        """The parameters' values in this rank's part."""
        return self.bucket.owned_by(self.group.rank())


class Zero1:
    """Sums gradients to their owners while backwards run, and brings updated weights back to all.

    passes: the parameters of every pass on this rank, by its place. quantized: the modules that keep FP8 blocks of a
    parameter. matrices: what a part may not cut. tied: the embedding where two pipeline ranks hold a copy each.
    """

    def __init__(
        self,
        main_grads: MainGrads,
        parameters: Sequence[Parameter],
        mesh: Mesh,
        passes: Mapping[Place, Sequence[Parameter]],
        *,
        quantized: Mapping[Parameter, QuantizedWeight],
        matrices: Matrices = no_matrices,
        tied: Parameter | None = None,
    ) -> None:
        self._mesh, self._tied, self._main_grads = mesh, tied, main_grads
        self._quantized = {place: [quantized[p] for p in fed if p in quantized] for place, fed in passes.items()}
        fed_by = defaultdict[Parameter, set[Place]](set)
        for place, fed in passes.items():
            for parameter in fed:
                fed_by[parameter].add(place)
        self.buckets: list[ShardedBucket] = []  # in the order in which a forward reads them
        self._whole: list[Tensor] = []  # buffers without other replicas
        for grad, group, expert in (
            (main_grads.dense, mesh.dense_group, False),
            (main_grads.expert, mesh.expert_group, True),
        ):
            if group is None:
                self._whole.append(grad)
                continue
            of_flat = [p for p in parameters if is_expert(p) is expert]
            for bucket in make_buckets(of_flat, lambda p: (fed_by[p], p is tied), group.size(), matrices):
                feeds = frozenset(fed_by[bucket.spans[0].parameter])
                self.buckets.append(ShardedBucket(bucket, grad, group, feeds))
        self.buckets.sort(key=lambda one: min(one.feeds))
        self._queue: list[ShardedBucket] = []
        self._unfinished: dict[ShardedBucket, int] = {}
        self._stale: set[Place] = set()

    def _stream(self) -> Stream:
        return communication_stream(self._main_grads.dense.device, REPLICAS)

    def is_sharded(self, grad: Tensor) -> bool:
        """Whether the parameters of this flat buffer have other replicas."""
        return any(one.grad is grad for one in self.buckets)

    def begin(self, schedule: Schedule) -> None:
        """A step by `schedule` follows; its gradients are being summed from their last W on."""
        last = [schedule.last_wgrads(rank) for rank in self._mesh.replicas]

        def ready(one: ShardedBucket) -> tuple[int, int]:
            if self._is_tied(one):  # on the last stage it would wait for the first, and all others for it
                return (sys.maxsize, 0)
            return max((of_rank[stage][1], -position) for of_rank in last for stage, position in one.feeds)

        self._queue = sorted(self.buckets, key=ready)
        self._unfinished = {one: len(one.feeds) for one in self.buckets}

    def before_forward(self, stage: int, position: int) -> None:
        self._arrive((stage, position))

    def after_last_wgrad(self, stage: int, position: int) -> None:
        for one in self._unfinished:
            self._unfinished[one] -= (stage, position) in one.feeds
        while self._queue and not self._unfinished[self._queue[0]]:
            one = self._queue.pop(0)
            one.reduction = self._stream().start(partial(self._reduce, one), _as_it_is, "gradients")

    def after_all_wgrads(self) -> None:
        """The same of every pass at once, for a run that has told of none."""
        for place in sorted(self._quantized, reverse=True):
            self.after_last_wgrad(*place)

    def finish(self) -> Tensor:
        """Wait for every sum -> FP64 [], the squares of the gradients that this rank owns."""
        assert not self._queue, "the schedule left gradients unfinished"
        squares = self._main_grads.dense.new_zeros((), dtype=torch.float64)
        for one in self.buckets:
            assert one.reduction is not None
            squares += one.reduction.wait()
            one.reduction = None
        for grad in self._whole:
            squares += squared_norm(grad)
        return squares

    def start_gather(self, one: ShardedBucket) -> None:
        """Send this rank's part of the weights to all, and fetch the others'; FP8 blocks follow when it is needed."""
        one.gathering = self._stream().start(partial(_gather, one), _as_it_is, "weights")
        self._stale |= one.feeds

    def wait_weights(self) -> None:
        """Wait until all weights are here, FP8 blocks included."""
        for place in sorted(self._stale):
            self._arrive(place)

    def _arrive(self, place: Place) -> None:
        if place not in self._stale:
            return
        for one in self.buckets:
            if one.gathering is not None and place in one.feeds:
                one.gathering.wait()
                one.gathering = None
        for module in self._quantized[place]:
            module.quantize()
        self._stale.discard(place)

    def _is_tied(self, one: ShardedBucket) -> bool:
        return one.bucket.spans[0].parameter is self._tied

    def _reduce(self, one: ShardedBucket) -> Tensor:
        """-> the squares of this rank's part; 0 for a tied copy, which the first stage counts."""
        reduce_scatter(one.grad, one.bucket.parts, one.group, "gradients")
        mine = one.grad[slice(*one.bounds)]
        if not self._is_tied(one):
            return squared_norm(mine)
        all_reduce_in_message(mine, self._mesh.tie_group, "tied embedding")
        return squared_norm(mine if self._mesh.pp_rank == 0 else mine[:0])


def _gather(one: ShardedBucket) -> None:
    assert one.weight is not None, "an optimizer makes the weights' buffer"
    all_gather(one.weight, one.bucket.parts, one.group, "weights")


def _as_it_is(value: Value) -> Value:
    return value
