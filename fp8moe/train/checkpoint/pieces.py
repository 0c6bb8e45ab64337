"""The tensors of a checkpoint by canonical name, and which part of each this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fp8moe.layers.linear import is_expert
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.optimizer import AdamW, DeepSpeedAdamW


def run_tensors(
    optimizer: AdamW | DeepSpeedAdamW,
    biases: Mapping[str, Tensor],
    loads: Mapping[str, Tensor],
    mesh: Mesh,
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by canonical name: the optimizer's, router biases, tokens each expert has had.

    held: what is taken of each of this rank's tensors, a copy for example.
    """
    tensors = {name: _as_stored(held(tensor), parameter, mesh) for name, parameter, tensor in optimizer.tensors()}
    tensors |= {f"bias.{name}": held(bias) for name, bias in biases.items()}
    return tensors | {f"load.{name}": held(load) for name, load in loads.items()}


def _as_stored(tensor: Tensor, parameter: Any, mesh: Mesh) -> Tensor:
    if mesh.ep == 1 or not is_expert(parameter):
        return tensor
    ranks = torch.cat([torch.arange(r * mesh.dp, (r + 1) * mesh.dp).view(mesh.edp, mesh.ep) for r in mesh.replicas])
    # Without process groups: nothing is communicated through these DTensors, they only say which rank holds what.
    axes = DeviceMesh(tensor.device.type, ranks, mesh_dim_names=("edp", "ep"), _init_backend=False)
    return DTensor.from_local(tensor, axes, [Replicate(), Shard(0)], run_check=False)
