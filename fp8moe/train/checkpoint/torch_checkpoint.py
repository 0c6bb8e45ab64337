"""torch.distributed.checkpoint's side of a checkpoint: it plans who writes which part of which tensor, and who reads it
on another layout; `storage` has the files.

Only what saves or loads a run's state imports this module: torch's takes a second to import, a third of the start of a
command, since sharded tensors and sympy come with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException as CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fp8moe.train.checkpoint.files import Folder, space_in_words, write_bytes
from fp8moe.train.checkpoint.hashed_file import WrittenFile
from fp8moe.train.checkpoint.pieces import Pieces
from fp8moe.train.checkpoint.storage import (
    INDEX_FILE,
    Part,
    TensorFile,
    dtype_name,
    dtype_named,
    read_index,
    write_safetensors,
)

# "... in a single process", which is meant. For good: filters within a block are the process's, not the thread's.
warnings.filterwarnings("ignore", message=".*assuming the intent is to.*", module="torch.distributed.checkpoint.*")


def write(
    folder: Folder, tensors: Mapping[str, Tensor | Pieces], group: dist.ProcessGroup | None
) -> dict[str, WrittenFile]:
    """Write `tensors` into an existing folder; the files of all ranks, on the coordinator. Collective over `group`."""
    writer = SafetensorsWriter(folder)
    dcp.save(
        dict(tensors),
        storage_writer=writer,
        planner=PiecesSavePlanner(),
        process_group=group,
        no_dist=group is None,
    )
    return writer.files


def read(folder: Folder, tensors: Mapping[str, Tensor | Pieces], group: dist.ProcessGroup | None) -> None:
    """Fill `tensors`, named as they were saved, on any layout of ranks. Collective over `group`."""
    dcp.load(
        dict(tensors),
        storage_reader=SafetensorsReader(folder),
        planner=PiecesLoadPlanner(),
        process_group=group,
        no_dist=group is None,
    )


class PiecesSavePlanner(DefaultSavePlanner):
    """torch's planner, which would look for pieces in subclasses of Tensor only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.at(index) if isinstance(found, Pieces) else super().lookup_object(index)


class PiecesLoadPlanner(DefaultLoadPlanner):
    """As `PiecesSavePlanner`; torch's would also put None in the place of pieces."""

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


class SafetensorsWriter(StorageWriter):
    """Writes into an existing folder; afterwards `files` are those of all ranks, on the coordinator."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.files: dict[str, WrittenFile] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder was given to the constructor."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            file = f"rank-{plan.storage_data}.safetensors"
            parts = [_part(item, planner) for item in plan.items]
            with space_in_words(self.folder, file, sum(part.num_bytes for part in parts)):
                written = write_safetensors(self.folder, file, parts)
            results = [WriteResult(item.index, written.size, (file, part_name(item), written)) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {}
        for result in (result for of_rank in results for result in of_rank):
            file, name, written = result.storage_data
            where[result.index] = (file, name)
            self.files[file] = written
        index = {name: _entry(name, stored, where) for name, stored in metadata.state_dict_metadata.items()}
        text = json.dumps({"tensors": index}).encode()
        self.files[INDEX_FILE] = write_bytes(self.folder, INDEX_FILE, text)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def part_name(item: WriteItem) -> str:
    """The name under which a part of a tensor lies in its file."""
    data = item.tensor_data
    assert data is not None, "a checkpoint holds tensors only"
    if data.chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def _part(item: WriteItem, planner: SavePlanner) -> Part:
    data = item.tensor_data
    assert data is not None, "a checkpoint holds tensors only"

    def values() -> Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    return Part(part_name(item), data.properties.dtype, data.chunk.sizes, values)


def _entry(name: str, stored: Any, where: Mapping[MetadataIndex, tuple[str, str]]) -> dict[str, Any]:
    assert isinstance(stored, TensorStorageMetadata)
    parts = []
    for chunk in stored.chunks:
        file, key = where[MetadataIndex(name, chunk.offsets)]
        parts.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file, "name": key})
    return {"dtype": dtype_name(stored.properties.dtype), "shape": list(stored.size), "parts": parts}


class SafetensorsReader(StorageReader):
    """Reads what a `SafetensorsWriter` wrote, each part of a tensor by itself."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder was given to the constructor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        where: dict[MetadataIndex, tuple[str, str]] = {}
        for name, entry in read_index(self.folder).items():
            chunks = []
            for part in entry["parts"]:
                chunk = ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["sizes"]))
                where[MetadataIndex(name, chunk.offsets)] = (part["file"], part["name"])
                chunks.append(chunk)
            properties = TensorProperties(dtype=dtype_named(entry["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(described, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._where = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            file, name = self._where[item.storage_index]
            by_file[file].append((item, name))
        for file, items in by_file.items():
            with self.folder.open(file) as handle:
                opened = TensorFile(handle, self.folder.chunk)
                for item, name in items:
                    box = [
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    ]
                    target = planner.resolve_tensor(item).detach()
                    opened.read_into(target, name, box)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
