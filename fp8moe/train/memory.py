"""Memory of weights and optimizer state on a rank, by formula and as it is.

    kind          bytes a parameter                                          shared out under ZeRO-1
    weights       2 (4 in FP32)                                              no
    FP8 blocks    2, and 8 for each 128x128 block, of weights of FP8 products  no
    gradients     4                                                          no
    masters       4 (none in FP32: the weights are they)                     over the replicas of the parameter
    moments       4 (8 in FP32); Muon's momentum 2 (4)                       over the replicas of the parameter

Activations are `model.memory`'s, and what else a rank's memory holds is `plan.memory`'s. Parameters come from
`model.memory.rank_weights`, or are counted on the model itself, which may be on the meta device.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping

import torch
from torch import nn

from fp8moe.layers.linear import QuantizedWeight, is_expert, matrices
from fp8moe.layers.recipe import Recipe
from fp8moe.model.memory import Weights, matrix_blocks
from fp8moe.model.transformer import Transformer
from fp8moe.train.config import TrainConfig
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer, OptimizerConfig

KINDS = ("weights", "FP8 blocks", "gradients", "masters", "moments")


def state_bytes(
    weights: Weights, recipe: Recipe, optimizer: OptimizerConfig, replicas: Mapping[bool, int]
) -> dict[str, float]:
    """Bytes of each kind by formula. replicas: ranks that share out a dense (False) and an expert (True) parameter."""
    size, moment = recipe.dtype.itemsize, 2 if optimizer.moments == "bf16" else 4
    shared = weights.dense / replicas[False] + weights.expert / replicas[True]
    by_muon = weights.dense_matrices / replicas[False] + weights.expert_matrices / replicas[True]
    quantized = weights.dense_matrices + weights.expert_matrices + 4 * weights.blocks
    return {
        "weights": float(size * weights.total),
        "FP8 blocks": 2.0 * quantized * recipe.fp8,
        "gradients": 4.0 * weights.total,
        "masters": 0.0 if recipe.dtype is torch.float32 else 4 * shared,
        "moments": moment * (2 * shared - by_muon * (optimizer.kind == "muon")),
    }


def expected_bytes(model: Transformer, optimizer: OptimizerConfig, replicas: Mapping[bool, int]) -> dict[str, float]:
    """The same of parameters that are counted on a model."""
    return state_bytes(counted_weights(model), model.recipe, optimizer, replicas)


def counted_weights(model: nn.Module) -> Weights:
    """The parameters of a model, which may be on the meta device."""
    total = Weights()
    quantized = {id(m.weight) for m in model.modules() if isinstance(m, QuantizedWeight) and matrices(m.weight)}
    for parameter in model.parameters():
        count = parameter.numel()
        inside = count if id(parameter) in quantized else 0
        blocks = 0
        if inside:
            *leading, n, k = parameter.shape
            blocks = math.prod(leading) * matrix_blocks(n, k)
        if is_expert(parameter):
            total += Weights(expert=count, expert_matrices=inside, blocks=blocks)
        else:
            total += Weights(dense=count, dense_matrices=inside, blocks=blocks)
    return total


def replicas_of(config: TrainConfig) -> dict[bool, int]:
    """Ranks that share out a dense (False) and an expert (True) parameter's masters and moments."""
    if config.optimizer.sharding == "none":
        return {False: 1, True: 1}
    copies = 2 if config.parallel.schedule == "dualpipe" else 1
    return {False: config.dp * copies, True: config.dp // config.ep * copies}


def measured_bytes(model: Transformer, optimizer: Optimizer | DeepSpeedAdamW) -> dict[str, int]:
    """Bytes of each kind that this rank's tensors have."""
    total = dict.fromkeys(KINDS, 0)
    total["weights"] = sum(p.nbytes for p in model.parameters())
    total["gradients"] = model.main_grads.dense.nbytes + model.main_grads.expert.nbytes
    for module in model.modules():
        if isinstance(module, QuantizedWeight) and module.recipe.fp8:
            for q in (module.blocks, module.transposed_blocks):
                total["FP8 blocks"] += q.data.nbytes + q.scale.nbytes
    if isinstance(optimizer, DeepSpeedAdamW):
        total["masters"], total["moments"] = optimizer.kept_bytes()
        return total
    for ranges in optimizer.held.values():
        for one in ranges:
            for kind, tensor in one.tensors.items():
                if kind != "master":
                    total["moments"] += tensor.nbytes
                elif one.parameter.dtype is not torch.float32:
                    total["masters"] += tensor.nbytes
    return total


def in_words(kinds: Mapping[str, float]) -> str:
    """'12.30 GB: weights 2.00, gradients 4.00, ...'; kinds without bytes are left out."""
    parts = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in kinds.items() if size)
    return f"{sum(kinds.values()) / 1e9:.3g} GB: {parts}"


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: on its GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
