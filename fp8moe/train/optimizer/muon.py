"""Muon for the matrices of hidden layers; what it leaves (embedding, output head, norms, gates) is AdamW's.

What is a matrix is `layers.linear.matrices`: each expert's by itself, gate and up apart, both down projections of
attention apart, heads together. Momentum is the only state beside the master, half of what AdamW keeps. One learning
rate and one decay serve both (`muon_step.size_factor`).

FP8 blocks are cast from the new weights in a launch of their own: the update is a chain of products already, and one
more pass over the weight is lost in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8moe.layers.linear import QuantizedWeight, matrices
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.muon_step import muon_step
from fp8moe.train.optimizer.state import Moment, Shard


class MuonUpdate:
    """Updates `shard`, which cuts no matrix, and the FP8 blocks of `quantized`, whose weights it holds whole.

    tensors: the momentum [n].
    """

    def __init__(self, shard: Shard, config: OptimizerConfig, quantized: Sequence[QuantizedWeight] = ()) -> None:
        self.shard, self._config, self._quantized = shard, config, quantized
        dtype = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self._momentum = torch.zeros_like(shard.master, dtype=dtype)
        self.tensors = {"momentum": self._momentum}
        self._matrices = [
            matrix.shifted(span.start - span.first - shard.start)
            for span in shard.spans
            for matrix in matrices(span.parameter)
            if span.first <= matrix.start and matrix.stop <= span.first + span.stop - span.start
        ]
        assert sum(matrix.stop - matrix.start for matrix in self._matrices) == len(shard.master), "a matrix is cut"

    def step(self, at: Moment) -> None:
        """One update; nothing waits for the device."""
        c, shard = self._config, self.shard
        muon_step(
            shard.master,
            shard.grad,
            self._momentum,
            shard.weight,
            self._matrices,
            lr=at.lr,
            momentum_beta=c.muon_beta,
            nesterov=c.nesterov,
            ns_steps=c.ns_steps,
            weight_decay=c.weight_decay,
            adjust=c.adjust,
            grad_scale=at.grad_scale,
        )
        for module in self._quantized:
            module.quantize()
