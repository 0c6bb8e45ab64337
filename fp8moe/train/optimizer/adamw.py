"""AdamW with FP32 masters and BF16 moments (DeepSeek-V3, sections 3.3 and 4.2).

The weights that a forward reads are BF16 copies, rounded from the masters within each update; in FP32 the parameter is
its own master. Decay is decoupled and falls on matrices only (two or more dimensions, the router's and the embedding
included), never on norms: the report gives 0.1 and no list, and a norm's gain has no reason to shrink to zero. The
gradient arrives as FP32 `main_grad`, already summed; the clip factor is applied inside the update, so that no pass
over the gradients is spent on it.

Masters, moments and BF16 weights are flat buffers in the order of the flat gradients, and parameters become views of
them. Writing each parameter through a table of addresses was refused, views are what gradients are already, and a shard
of a flat buffer is a slice. Without other replicas, or without sharding, one launch updates a whole buffer, and a
weight that FP8 products read is updated by a launch of its own, which writes its blocks too. Under ZeRO-1 a rank holds
masters and moments of its parts alone; a launch updates a part, whose BF16 weights leave at once (`parallel.zero`), and
blocks are made of what has arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.segments import Segments
from fp8moe.layers.linear import MainGrads, QuantizedWeight, is_expert
from fp8moe.parallel.zero import ShardedBucket, Zero1
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.state import Held, Shard, flat_weights, part, whole


@dataclass(frozen=True)
class _Moments:
    """A shard with its moments [n]. segments: what one launch updates, all but the weights of `quantized`."""

    shard: Shard
    exp_avg: Tensor
    exp_avg_sq: Tensor
    segments: Segments
    quantized: tuple[QuantizedWeight, ...] = ()
    bucket: ShardedBucket | None = None

    def held(self) -> Iterator[Held]:
        kinds = {"master": self.shard.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        yield from self.shard.held(kinds)

    def of(self, parameter: Parameter) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(master, gradient, moments) of a whole `parameter`, in its shape."""
        flats = (self.shard.master, self.shard.grad, self.exp_avg, self.exp_avg_sq)
        master, grad, exp_avg, exp_avg_sq = (self.shard.of(parameter, flat) for flat in flats)
        return master, grad, exp_avg, exp_avg_sq


class AdamW:
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
        self._shards: list[_Moments] = []
        named = {p: name for name, p in model.named_parameters()}
        fp8 = {m.weight: m for m in model.modules() if isinstance(m, QuantizedWeight) and m.recipe.fp8}
        for grad, expert in ((main_grads.dense, False), (main_grads.expert, True)):
            parameters = [p for p in named if is_expert(p) is expert]
            if zero is None or not zero.is_sharded(grad):
                self._add(whole(parameters, grad), tuple(fp8[p] for p in parameters if p in fp8))
                continue
            weights = flat_weights(parameters, grad)
            for one in (one for one in zero.buckets if one.grad is grad):
                one.weight = weights
                self._add(part(one.owned, one.bounds, grad, weights), bucket=one)
        self.held: dict[str, list[Held]] = {name: [] for name in named.values()}
        for one_shard in self._shards:
            for held in one_shard.held():
                self.held[named[held.parameter]].append(held)

    def _add(
        self, shard: Shard, quantized: tuple[QuantizedWeight, ...] = (), bucket: ShardedBucket | None = None
    ) -> None:
        moments = torch.bfloat16 if self.config.moments == "bf16" else torch.float32
        apart = {id(module.weight) for module in quantized}
        spans = [s for s in shard.spans if id(s.parameter) not in apart]
        segments = [(s.start - shard.start, s.stop - shard.start, s.parameter.ndim >= 2) for s in spans]
        exp_avg, exp_avg_sq = (torch.zeros_like(shard.master, dtype=moments) for _ in range(2))
        of_device = Segments.of(segments, shard.master.device)
        self._shards.append(_Moments(shard, exp_avg, exp_avg_sq, of_device, quantized, bucket))

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it.

        Weights, masters and moments change, and the FP8 blocks of the weights that have some; those of sharded buffers
        when `Zero1` has brought them. One launch a shard and one a weight with blocks; nothing waits for the device.
        """
        self.updates += 1
        c, scale = self.config, min(1.0, self.config.clip_norm / (grad_norm + 1e-6))
        settings: dict[str, Any] = dict(
            lr=lr,
            beta1=c.beta1,
            beta2=c.beta2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            step=self.updates,
            grad_scale=self._shards[0].shard.master.new_full((), scale),
        )
        for one in self._shards:
            shard = one.shard
            adamw_step(shard.master, shard.grad, one.exp_avg, one.exp_avg_sq, one.segments, shard.weight, **settings)
            if one.bucket is not None and self._zero is not None:
                self._zero.start_gather(one.bucket)
            for module in one.quantized:
                weight, both = module.weight, (module.blocks, module.transposed_blocks)
                power_of_two = module.recipe.power_of_two(False)
                adamw_step_quantize(*one.of(weight), weight.detach(), *both, **settings, power_of_two=power_of_two)

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Round the masters, after they were loaded, into parameters and FP8 blocks. Collective where sharded."""
        for one in self._shards:
            for held in one.held() if one.bucket is None else ():
                values = held.parameter.detach().view(-1)
                if values.dtype is not torch.float32:
                    values.copy_(held.tensors["master"])
            if one.bucket is not None and self._zero is not None:
                if one.shard.weight is not None:
                    one.shard.weight.copy_(one.shard.master)
                self._zero.start_gather(one.bucket)
            for module in one.quantized:
                module.quantize()
        if self._zero is not None:
            self._zero.settle()
