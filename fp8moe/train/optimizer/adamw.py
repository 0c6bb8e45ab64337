"""AdamW with FP32 masters and BF16 moments (DeepSeek-V3, sections 3.3 and 4.2).

Decay is decoupled and falls on matrices only (two or more dimensions, the router's and the embedding included), never
on norms: the report gives 0.1 and no list, and a norm's gain has no reason to shrink to zero. The clip factor is
applied inside the update, so that no pass over the gradients is spent on it.

One launch updates a whole shard. A weight that FP8 products read, where this rank updates all of it, is updated by a
launch of its own, which writes its blocks too; otherwise blocks are made of what the all-gather brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.segments import Segments
from fp8moe.layers.linear import QuantizedWeight, decays
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.state import Moment, Shard


class AdamWUpdate:
    """Updates `shard`, and with them the FP8 blocks of `quantized`, whose weights it holds whole.

    tensors: both moments [n].
    """

    def __init__(self, shard: Shard, config: OptimizerConfig, quantized: Sequence[QuantizedWeight] = ()) -> None:
        self.shard, self._config, self._quantized = shard, config, quantized
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self._exp_avg, self._exp_avg_sq = (torch.zeros_like(shard.master, dtype=moments) for _ in range(2))
        self.tensors = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        apart = {id(module.weight) for module in quantized}
        spans = [span for span in shard.spans if id(span.parameter) not in apart]
        segments = [(s.start - shard.start, s.stop - shard.start, decays(s.parameter)) for s in spans]
        self._segments = Segments.of(segments, shard.master.device)

    def step(self, at: Moment) -> None:
        """One update; nothing waits for the device."""
        c, shard = self._config, self.shard
        settings: dict[str, Any] = dict(
            lr=at.lr,
            beta1=c.beta1,
            beta2=c.beta2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            step=at.update,
            grad_scale=at.grad_scale,
        )
        adamw_step(shard.master, shard.grad, self._exp_avg, self._exp_avg_sq, self._segments, shard.weight, **settings)
        for module in self._quantized:
            flats = (shard.master, shard.grad, self._exp_avg, self._exp_avg_sq)
            master, grad, exp_avg, exp_avg_sq = (shard.of(module.weight, flat) for flat in flats)
            adamw_step_quantize(
                master,
                grad,
                exp_avg,
                exp_avg_sq,
                module.weight.detach(),
                module.blocks,
                module.transposed_blocks,
                **settings,
                power_of_two=module.recipe.power_of_two(False),
            )
