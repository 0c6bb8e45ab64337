"""Gradients across ranks: summed over the ranks that hold the same parameter, and their norm over all parameters.

The loss is a sum over tokens divided by the token count of the GLOBAL batch, so gradients are added, never averaged:
dense ones over the ranks with the same stage, expert ones over those of them with the same experts. A stage that lives
on two pipeline ranks is two more replicas, nothing else. A copy of the embedding on the last stage is summed with the
first stage's after that. Every parameter counts once in the norm, an expert's once for each ep rank's own experts; so
neither depends on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.layers.linear import MainGrads
from fp8moe.layers.router import Router
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh

BUCKET = 64 * 2**20  # elements of one collective: bounds the memory that a back end needs for its copy


def reduce_gradients(main_grads: MainGrads, mesh: Mesh, tied: Tensor | None = None) -> None:
    """Sum `main_grad` over the ranks that hold the same parameter. Collective; every rank calls it once a step.

    tied: on the ranks of `mesh.tie_group`, the `main_grad` of their embedding.
    """
    for flat, group in ((main_grads.dense, mesh.dense_group), (main_grads.expert, mesh.expert_group)):
        for bucket in flat.split(BUCKET):
            all_reduce(bucket, group)
    if tied is not None:
        all_reduce(tied, mesh.tie_group)


def global_grad_norm(main_grads: MainGrads, mesh: Mesh, copy: Tensor | None = None) -> float:
    """The L2 norm of all gradients, each parameter counted once, after `reduce_gradients`. Collective over ep and pp.

    It is read on the host, the one transfer that the guard's decision needs.

    copy: the `main_grad` of a tied copy, which another rank counts: it is left out, wherever in the dense buffer it is.
    """
    dense = main_grads.dense
    before, after = dense[:0], dense
    if copy is not None:
        assert copy.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr(), "a view of the dense buffer"
        start = copy.storage_offset() - dense.storage_offset()
        before, after = dense[:start], dense[start + copy.numel() :]
    squared = squared_norm(before) + squared_norm(after) + all_reduce(squared_norm(main_grads.expert), mesh.ep_group)
    if not mesh.is_counted:
        squared = torch.zeros_like(squared)
    return float(all_reduce(squared, mesh.pp_group).sqrt())


def reduce_counts(model: nn.Module, mesh: Mesh) -> None:
    """Sum every router's `counts_E` over the ranks of its stage, once a step: the loads of the whole batch."""
    counts = [m.counts_E for m in model.modules() if isinstance(m, Router)]
    if counts:
        total = all_reduce(torch.cat(counts), mesh.dense_group)
        for mine, summed in zip(counts, total.split([c.numel() for c in counts]), strict=True):
            mine.copy_(summed)
