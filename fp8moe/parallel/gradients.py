"""Gradients across ranks: summed over the ranks that hold the same parameter, measured once over all of them.

The loss is a sum over tokens divided by the token count of the GLOBAL batch, so gradients are added, never averaged:
dense ones over the ranks with the same stage, expert ones over those of them with the same experts. A stage that lives
on two pipeline ranks is two more replicas, nothing else. A copy of the embedding on the last stage is summed with the
first stage's after that. A parameter's norm counts once, an expert's once for each ep rank's own experts; so neither
depends on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.router import Router
from fp8moe.layers.wgrad import MainGrads
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh

BUCKET = 64 * 2**20  # elements of one collective: bounds the memory a back end needs for its copy


def reduce_gradients(main_grads: MainGrads, mesh: Mesh, tied: Tensor | None = None) -> None:
    """Sum `main_grad` over the ranks that hold the same parameter. Collective; every rank calls it once a step.

    tied: on the ranks of `mesh.tie_group`, the `main_grad` of their embedding.
    """
    for flat, group in zip(_both(main_grads), (mesh.dense_group, mesh.expert_group), strict=True):
        for bucket in flat.split(BUCKET):
            all_reduce(bucket, group)
    if tied is not None:
        all_reduce(tied, mesh.tie_group)


def global_grad_norm(main_grads: MainGrads, mesh: Mesh, copy: Tensor | None = None) -> float:
    """The L2 norm of all gradients, each parameter counted once, after `reduce_gradients`. Collective over ep and pp.

    copy: the `main_grad` of a tied copy, counted elsewhere; it begins the dense buffer.
    """
    flat = main_grads.dense
    if copy is not None:
        assert copy.data_ptr() == flat.data_ptr(), "the embedding is a model's first parameter"
        flat = flat[copy.numel() :]
    dense, expert = (torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in (flat, main_grads.expert))
    squared = dense + all_reduce(expert, mesh.ep_group)
    if not mesh.is_counted:
        squared = torch.zeros_like(squared)
    return float(all_reduce(squared, mesh.pp_group).sqrt())


def _both(main_grads: MainGrads) -> tuple[Tensor, Tensor]:
    return main_grads.dense, main_grads.expert


def reduce_counts(model: nn.Module, mesh: Mesh) -> None:
    """Sum every router's `counts_E` over the ranks of its stage, once a step: the loads of the whole batch."""
    counts = [m.counts_E for m in model.modules() if isinstance(m, Router)]
    if counts:
        total = all_reduce(torch.cat(counts), mesh.dense_group)
        for mine, summed in zip(counts, total.split([c.numel() for c in counts]), strict=True):
            mine.copy_(summed)
