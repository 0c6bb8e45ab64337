"""The tensors of a checkpoint by canonical name, and which part of each this rank holds.

A parameter is one logical tensor whatever the layout: its values end to end, experts stacked in the order of their
numbers. So tensors are one-dimensional here: a range of values is what a shard holds, and would be no box in more
dimensions. `state.json` keeps the shapes. Which ranks hold the same range is torch.distributed.checkpoint's to find: of
equal ranges one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8moe.layers.linear import is_expert
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.optimizer.state import Held

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


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
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # a second to import: `torch_checkpoint`

    return ChunkStorageMetadata(torch.Size([offset]), values.shape)


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
