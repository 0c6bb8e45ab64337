"""A Hugging Face directory, read lazily: headers of all shards first, then tensors by rows, as FP32 values.

The safetensors library checks a header against its file's length, so a file that is cut off is found before anything is
read. Files are mapped; a mapping is dropped after 64 MB were read through it, so that what was read does not stay in
memory. Block FP8: `NAME_scale_inv` beside `NAME` [N, K] holds FP32 [ceil(N/128), ceil(K/128)], blocks at the edges may
be short. Pickles (.bin, .pt) are refused: loading one runs what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8moe.errors import ConfigError, DataError
from fp8moe.interop.families import read_json

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
BLOCK = 128
MAPPED = 1 << 26  # bytes read through a mapping before it is dropped
_PLAIN = {"F32": 4, "BF16": 2, "F16": 2}
_CODES = "F8_E4M3"


@dataclass(frozen=True)
class Entry:
    """A tensor in a shard: the shard's name, safetensors' name of the dtype, the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HfDirectory:
    """Tensors of a directory by name: `entries`. Raises DataError or ConfigError with a sentence."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        _check_quantization(folder, config.get("quantization_config"))
        self.entries: dict[str, Entry] = {}
        for file, expected in _shards(folder).items():
            found = self._entries_of(file)
            if lacking := sorted(expected - found.keys()):
                raise DataError(f"{folder / file} lacks {lacking[0]}, which {INDEX} has in it: download it again")
            self.entries |= found
        self._open: tuple[str, Any] | None = None
        self._read = 0
        for name in self.entries:
            self._check_scale(name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._bytes(name) for name in self.entries)

    def _bytes(self, name: str) -> int:
        return torch.Size(self.entries[name].shape).numel() * self.itemsize(name)

    def itemsize(self, name: str) -> int:
        """Bytes of a value of a tensor."""
        return _PLAIN.get(self.entries[name].dtype, 1)

    def _entries_of(self, file: str) -> dict[str, Entry]:
        path = self.folder / file
        if not path.is_file():
            raise DataError(f"{path} is missing: download it again")
        try:
            with safe_open(path, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
                return {name: Entry(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is cut off or damaged ({error}): download it again") from error

    def is_scale(self, name: str) -> bool:
        """Whether a tensor holds the scales of another."""
        base = name.removesuffix(SCALE)
        return base != name and base in self.entries and self.entries[base].dtype == _CODES

    def _check_scale(self, name: str) -> None:
        entry = self.entries[name]
        if entry.dtype in _PLAIN:
            return
        if entry.dtype != _CODES:
            raise DataError(
                f"{self.folder / entry.file}: {name} is {entry.dtype}, which is not supported: use weights in BF16, "
                "FP16, FP32 or block FP8"
            )
        scale = self.entries.get(name + SCALE)
        if scale is None:
            raise DataError(
                f"{self.folder / entry.file}: {name} is FP8 and {name + SCALE} is missing: download it again"
            )
        *leading, n, k = entry.shape if len(entry.shape) > 1 else (1, *entry.shape)
        grid = (*leading, -(-n // BLOCK), -(-k // BLOCK))
        if scale.shape != grid or scale.dtype not in _PLAIN:
            raise DataError(
                f"{self.folder / scale.file}: {name + SCALE} is {scale.dtype} {list(scale.shape)} and "
                f"{list(entry.shape)} in blocks of {BLOCK} needs F32 {list(grid)}: use blocks of {BLOCK}x{BLOCK}"
            )

    def _slice(self, name: str) -> Any:
        file = self.entries[name].file
        if self._open is None or self._open[0] != file or self._read > MAPPED:
            self._open, self._read = None, 0
            try:
                self._open = (file, safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"{self.folder / file} can't be read ({error}): download it again") from error
        return self._open[1].get_slice(name)

    def rows(self, name: str, first: int, stop: int, expert: int | None = None) -> Tensor:
        """Rows [first, stop) of a tensor [N, K] or [N], or of a matrix of one [E, N, K], in FP32, a copy."""
        entry, rows = self.entries[name], slice(first, stop)
        place = rows if expert is None else (expert, rows)
        values = self._slice(name)[place]
        self._read += values.nbytes
        if entry.dtype != _CODES:
            return values.to(torch.float32, copy=True)
        blocks = slice(first // BLOCK, -(-stop // BLOCK))
        scale = self._slice(name + SCALE)[blocks if expert is None else (expert, blocks)]
        return dequantized(values, scale.to(torch.float32), first % BLOCK)


def dequantized(codes: Tensor, scale: Tensor, skipped: int = 0) -> Tensor:
    """codes [n, K] E4M3, scale FP32 by blocks -> FP32 [n, K]; skipped: rows of the first block before the codes."""
    by_row = scale.repeat_interleave(BLOCK, dim=0)[skipped : skipped + len(codes)]
    out = codes.to(torch.float32)
    for block in range(scale.shape[1]):
        out[:, block * BLOCK : (block + 1) * BLOCK] *= by_row[:, block : block + 1]
    return out


def is_hf_directory(folder: Path) -> bool:
    """Whether a path is a directory with a config.json and safetensors, and no run directory."""
    return folder.is_dir() and (folder / "config.json").is_file()


def _shards(folder: Path) -> dict[str, set[str]]:
    """The shards of a directory and the tensors that its index has in each."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise DataError(f"{folder / INDEX} has no weight_map: download it again")
        shards: dict[str, set[str]] = {}
        for name, file in names.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise DataError(f"{folder / INDEX} names {file!r}, which is no file of its folder: download it again")
            shards.setdefault(file, set()).add(name)
        return dict(sorted(shards.items()))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: set()}
    if found:
        raise DataError(f"{folder} has {len(found)} safetensors files and no {INDEX}: download it again")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which would run what it says: use safetensors"
        )
    raise DataError(f"{folder} has no safetensors files: name the directory of a released model")


def _check_quantization(folder: Path, quantization: Any) -> None:
    if quantization is None:
        return
    where = f"{folder / 'config.json'}: quantization_config"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise ConfigError(f"{where}.quant_method={method!r} is not supported: use weights in BF16, FP32 or block FP8")
    size = quantization.get("weight_block_size")
    if size is None or list(size) != [BLOCK, BLOCK]:
        raise ConfigError(f"{where}.weight_block_size={size} is not supported: use one of [{BLOCK}, {BLOCK}]")
