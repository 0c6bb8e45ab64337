"""Tensors of a checkpoint as safetensors files, one a rank, and their index; `torch_checkpoint` plans them.

Nothing is pickled, so that nothing in a checkpoint can run. Each file is hashed from memory as it is written. Beside
the state itself the host holds one tensor while saving (none, where the state lies on the host), and `Folder.chunk`
bytes or one row of a tensor while loading. Refused: torch's own file writer, whose index is a pickle, and its Hugging
Face writer, which hashes nothing and serialises a rank's whole share in memory at once.

    rank-N.safetensors   the parts that rank N wrote: a whole tensor by its name, a part as name@offset,offset
    index.json           tensor -> dtype, shape, parts: (offsets, sizes, file, name there)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fp8moe.train.checkpoint.files import Folder, read_text
from fp8moe.train.checkpoint.hashed_file import WrittenFile

INDEX_FILE = "index.json"
_NAMES = {  # safetensors' names of the dtypes that a run's state and an exported model have
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
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


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a dtype."""
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`. Raises KeyError where a checkpoint has none of that name."""
    return _DTYPES[name]


def write_safetensors(
    folder: Folder, name: str, parts: Sequence[Part], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """A safetensors file (github.com/huggingface/safetensors, its format section), of which one tensor at a time is on
    the host beside those that lie there anyway. metadata: text in its header."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
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


def read_index(folder: Folder) -> dict[str, dict[str, Any]]:
    """The entries of index.json by tensor: dtype, shape, parts."""
    entries: dict[str, dict[str, Any]] = json.loads(read_text(folder, INDEX_FILE))["tensors"]
    return entries
