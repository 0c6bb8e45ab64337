"""Tensors of a checkpoint as safetensors files, one a rank, for torch.distributed.checkpoint to plan and to reshard.

torch plans who writes which part of which tensor, and who reads it on another layout; this module stores the parts and
an index in JSON. Nothing is pickled, so that nothing in a checkpoint can run. Each file is hashed from memory as it is
written. Refused: torch's own file writer, whose index is a pickle, and its Hugging Face writer, which hashes nothing
and serialises a rank's whole share in memory at once.

    rank-N.safetensors   the parts that rank N wrote: a whole tensor by its name, a part as name@offset,offset
    index.json           tensor -> dtype, shape, parts: (offsets, sizes, file, name there)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor
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

INDEX_FILE = "index.json"
_NAMES = {  # safetensors' names of the dtypes that a run's state has
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class WrittenFile:
    """Size and XXH3-128 of the bytes that a file was given."""

    size: int
    xxh3: str


class HashedFile:
    """A file that is hashed as it is written, and on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._handle = open(path, "wb")  # noqa: SIM115
        self._digest, self._size = xxhash.xxh3_128(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> WrittenFile:
        """Flush, synchronize, close."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        return WrittenFile(self._size, self._digest.hexdigest())


def write_bytes(path: Path, content: bytes) -> WrittenFile:
    """A file of `content`, hashed and on disk."""
    file = HashedFile(path)
    file.write(content)
    return file.close()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """A safetensors file (github.com/huggingface/safetensors, its format section) of CPU tensors, tensor by tensor."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = HashedFile(path)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return file.close()


class SafetensorsWriter(StorageWriter):
    """Writes into an existing folder; afterwards `files` are those of all ranks, on the coordinator."""

    def __init__(self, folder: Path) -> None:
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
            tensors = {part_name(item): _on_cpu(planner.resolve_data(item)) for item in plan.items}
            file = f"rank-{plan.storage_data}.safetensors"
            written = write_safetensors(self.folder / file, tensors)
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
        self.files[INDEX_FILE] = write_bytes(self.folder / INDEX_FILE, text)

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


def _on_cpu(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().cpu()


def _entry(name: str, stored: Any, where: Mapping[MetadataIndex, tuple[str, str]]) -> dict[str, Any]:
    assert isinstance(stored, TensorStorageMetadata)
    parts = []
    for chunk in stored.chunks:
        file, key = where[MetadataIndex(name, chunk.offsets)]
        parts.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file, "name": key})
    return {"dtype": _NAMES[stored.properties.dtype], "shape": list(stored.size), "parts": parts}


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of index.json by tensor: dtype, shape, parts."""
    entries: dict[str, dict[str, Any]] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["tensors"]
    return entries


class SafetensorsReader(StorageReader):
    """Reads what a `SafetensorsWriter` wrote, each part of a tensor by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder was given to the constructor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        dtypes = {name: dtype for dtype, name in _NAMES.items()}
        described: dict[str, Any] = {}
        where: dict[MetadataIndex, tuple[str, str]] = {}
        for name, entry in read_index(self.folder).items():
            chunks = []
            for part in entry["parts"]:
                chunk = ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["sizes"]))
                where[MetadataIndex(name, chunk.offsets)] = (part["file"], part["name"])
                chunks.append(chunk)
            properties = TensorProperties(dtype=dtypes[entry["dtype"]])
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
            with safe_open(self.folder / file, framework="pt") as opened:
                for item, name in items:
                    box = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    value = opened.get_slice(name)[box] if box else opened.get_tensor(name)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(value)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
