"""Gradients across ranks: summed over the ranks that hold the same parameter, measured once over all of them.

The loss is a sum over tokens divided by the token count of the GLOBAL batch, so gradients are added, never averaged:
dense ones over `dp`, expert ones over `edp`. A dense parameter's norm counts once, an expert's once for each ep rank's
own experts; so neither depends on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.main_grad import MainGrads
from fp8moe.layers.router import Router
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh

BUCKET = 64 * 2**20  # elements of one collective: bounds the memory a back end needs for its copy


def reduce_gradients(main_grads: MainGrads, mesh: Mesh) -> None:
    """Sum `main_grad` over the ranks that hold the same parameter. Collective; every rank calls it once a step."""
    for flat, group in zip(_both(main_grads), (mesh.dp_group, mesh.edp_group), strict=True):
        for bucket in flat.split(BUCKET):
            all_reduce(bucket, group)


def global_grad_norm(main_grads: MainGrads, mesh: Mesh) -> float:
    """The L2 norm of all gradients, each parameter counted once, after `reduce_gradients`. Collective over ep."""
    dense, expert = (torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in _both(main_grads))
    return float((dense + all_reduce(expert, mesh.ep_group)).sqrt())


def _both(main_grads: MainGrads) -> tuple[Tensor, Tensor]:
    return main_grads.dense, main_grads.expert


def reduce_counts(model: nn.Module, mesh: Mesh) -> None:
    """Sum every router's `counts_E` over dp: the loads of the whole batch. Collective, once a step."""
    counts = [m.counts_E for m in model.modules() if isinstance(m, Router)]
    if counts:
        total = all_reduce(torch.cat(counts), mesh.dp_group)
        for mine, summed in zip(counts, total.split([c.numel() for c in counts]), strict=True):
            mine.copy_(summed)
