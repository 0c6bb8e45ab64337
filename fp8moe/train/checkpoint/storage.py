"""Tensors of a checkpoint as safetensors files, one a rank, for torch.distributed.checkpoint to plan and to reshard.

torch plans who writes which part of which tensor, and who reads it on another layout; this module stores the parts and
an index in JSON. Nothing is pickled, so that nothing in a checkpoint can run. Each file is hashed from memory as it is
written. Beside the state itself the host holds one tensor while saving (none, where the state lies on the host), and
`Folder.chunk` bytes or one row of a tensor while loading. Refused: torch's own file writer, whose index is a pickle,
and its Hugging Face writer, which hashes nothing and serialises a rank's whole share in memory at once.

    rank-N.safetensors   the parts that rank N wrote: a whole tensor by its name, a part as name@offset,offset
    index.json           tensor -> dtype, shape, parts: (offsets, sizes, file, name there)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
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

from fp8moe.train.checkpoint.files import Folder, read_text, space_in_words, write_bytes
from fp8moe.train.checkpoint.hashed_file import WrittenFile

INDEX_FILE = "index.json"
_NAMES = {  # safetensors' names of the dtypes that a run's state has
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 100_000_000  # as in safetensors' own reader


@dataclass(frozen=True)
class Part:
    """A tensor that is written to a file: its name there, and where its values come from when it is its turn."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(folder: Folder, name: str, parts: Sequence[Part]) -> WrittenFile:
    """A safetensors file (github.com/huggingface/safetensors, its format section), of which one tensor at a time is on
    the host beside those that lie there anyway."""
    header: dict[str, Any] = {}
    end = 0
    for part in parts:
        start, end = end, end + part.num_bytes
        header[part.name] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = folder.create(name)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for part in parts:
        tensor = part.values()
        assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, tuple(part.shape)), part.name
        if tensor.numel():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return file.close()


class TensorFile:
    """A safetensors file that is open for reading: parts of tensors, a bounded number of bytes at a time.

    Raises ValueError or KeyError where its header is none. chunk: bytes read at once, one row at least.
    """

    def __init__(self, file: BinaryIO, chunk: int) -> None:
        self._file, self._chunk = file, chunk
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes, where {_LONGEST_HEADER} are the most, is none")
        self._header, self._start = json.loads(file.read(length)), 8 + length

    def read_into(self, target: Tensor, name: str, box: Sequence[slice]) -> None:
        """Fill `target` with the part `box` (a slice a dimension, of step 1) of the tensor `name`."""
        for rows, values in self._pieces(name, box):
            (target[rows] if box else target).copy_(values)

    def _pieces(self, name: str, box: Sequence[slice]) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the target, their values): the box, cut along its first dimension."""
        entry = self._header[name]
        dtype, shape, start = _DTYPES[entry["dtype"]], entry["shape"], self._start + entry["data_offsets"][0]
        row = prod(shape[1:]) * dtype.itemsize
        first, last = (box[0].start, box[0].stop) if box else (0, 1)
        step = max(1, self._chunk // max(1, row))
        for begin in range(first, last if row else first, step):
            end = min(last, begin + step)
            self._file.seek(start + begin * row)
            content = bytearray((end - begin) * row)
            if self._file.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise ValueError(f"it ends within {name}")
            values = torch.frombuffer(content, dtype=dtype).view([end - begin, *shape[1:]] if box else [])
            yield slice(begin - first, end - first), values[(slice(None), *box[1:])] if box else values


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
    return {"dtype": _NAMES[stored.properties.dtype], "shape": list(stored.size), "parts": parts}


def read_index(folder: Folder) -> dict[str, dict[str, Any]]:
    """The entries of index.json by tensor: dtype, shape, parts."""
    entries: dict[str, dict[str, Any]] = json.loads(read_text(folder, INDEX_FILE))["tensors"]
    return entries


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
            properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
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
