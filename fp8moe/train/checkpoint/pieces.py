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
from fp8moe.train.optimizer import AdamW


def run_tensors(
    optimizer: AdamW,
    biases: Mapping[str, Tensor],
    loads: Mapping[str, Tensor],
    mesh: Mesh,
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    averages: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by canonical name: the optimizer's, router biases, tokens each expert has had.

    held: what is taken of each of this rank's tensors, a copy for example. averages: of the masters (`train.ema`),
    stored as ema.NAME, the same parts of them as of master.NAME.
    """
    entries = list(optimizer.tensors())
    if averages is not None:
        masters = [(name.removeprefix("master."), p) for name, p, _ in entries if name.startswith("master.")]
        entries += [(f"ema.{name}", parameter, averages[name]) for name, parameter in masters]
    tensors = {name: _as_stored(held(tensor), parameter, mesh) for name, parameter, tensor in entries}
    tensors |= {f"bias.{name}": held(bias) for name, bias in biases.items()}
    return tensors | {f"load.{name}": held(load) for name, load in loads.items()}


def _as_stored(tensor: Tensor, parameter: Any, mesh: Mesh) -> Tensor:
    if mesh.ep == 1 or not is_expert(parameter):
        return tensor
    ranks = torch.cat([torch.arange(r * mesh.dp, (r + 1) * mesh.dp).view(mesh.edp, mesh.ep) for r in mesh.replicas])
    # Without process groups: nothing is communicated through these DTensors, they only say which rank holds what.
    axes = DeviceMesh(tensor.device.type, ranks, mesh_dim_names=("edp", "ep"), _init_backend=False)
    return DTensor.from_local(tensor, axes, [Replicate(), Shard(0)], run_check=False)
