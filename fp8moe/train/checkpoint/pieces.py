"""The tensors of a checkpoint by canonical name, and which part of each this rank holds.

A parameter is one logical tensor whatever the layout: its values end to end, experts stacked in the order of their
numbers. So tensors are one-dimensional here: a range of values is what a shard holds, and would be no box in more
dimensions. `state.json` keeps the shapes. Which ranks hold the same range is torch.distributed.checkpoint's to find: of
equal ranges one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from fp8moe.layers.linear import is_expert
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.optimizer.state import Held


@dataclass(frozen=True)
class Pieces:
    """Ranges of a logical tensor [length]: the offset and the values [n] of each; planned by torch's protocol."""

    length: int
    ranges: tuple[tuple[int, Tensor], ...]

    def size(self) -> torch.Size:
        return torch.Size([self.length])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offset, values) for offset, values in self.ranges]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([offset])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(offset, values), TensorProperties.create_from_tensor(values), self.size()
                ),
            )
            for offset, values in self.ranges
        ]

    def at(self, index: MetadataIndex) -> Tensor:
        """The values of the range that begins where `index` says."""
        assert index.offset is not None
        return next(values for offset, values in self.ranges if offset == index.offset[0])


def _chunk(offset: int, values: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([offset]), values.shape)


class SavePlanner(DefaultSavePlanner):
    """torch's planner, which would look for pieces in subclasses of Tensor only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.at(index) if isinstance(found, Pieces) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """As `SavePlanner`; torch's would also put None in the place of pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        given = dict(state_dict)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = self.original_state_dict = given

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        if isinstance(found, Pieces):
            return found.at(index)
        tensor: Tensor = super().lookup_tensor(index)
        return tensor


def run_tensors(
    held: Mapping[str, Iterable[Held]],
    biases: Mapping[str, Tensor],
    loads: Mapping[str, Tensor],
    mesh: Mesh,
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor | Pieces]:
    """All tensors of a checkpoint by canonical name: the optimizer's, router biases, tokens each expert has had.

    take: what is taken of each of this rank's tensors, a copy for example.
    """
    tensors: dict[str, Tensor | Pieces] = {}
    for name, ranges in held.items():
        for kind in sorted({kind for one in ranges for kind in one.tensors}):
            tensors[f"{kind}.{name}"] = _pieces(((one, take(one.tensors[kind])) for one in ranges), mesh)
    tensors |= {f"bias.{name}": take(bias) for name, bias in biases.items()}
    return tensors | {f"load.{name}": take(load) for name, load in loads.items()}


def _pieces(ranges: Iterable[tuple[Held, Tensor]], mesh: Mesh) -> Pieces:
    length, found = 0, []
    for one, values in ranges:
        size, before = one.parameter.numel(), 0
        if is_expert(one.parameter):
            before, size = mesh.ep_rank * size, mesh.ep * size
        found.append((before + one.first, values))
        length = size
    return Pieces(length, tuple(found))


def logical_shape(parameter: torch.nn.Parameter, mesh: Mesh) -> list[int]:
    """The shape of a parameter with all experts."""
    shape = list(parameter.shape)
    return [shape[0] * mesh.ep, *shape[1:]] if is_expert(parameter) else shape
