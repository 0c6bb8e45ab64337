"""A checkpoint of ours as a Hugging Face directory: released names, shards of at most 5 GB with an index, config.json.

One tensor at a time is on the host, at the width that is written, beside 64 MB of FP32 values, or 128 MB where FP8 is
compared with the source of an import. FP8 codes are those of `kernels.quantize.quantize_blocks` of the BF16 weight, in
bands of whole blocks; a weight's scales follow it in the file and are kept until then. The directory is written beside
its place, checked by the readers' rules (`readers`), and renamed, so that it is whole and right, or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fp8moe.data.durable import write_text
from fp8moe.errors import DataError
from fp8moe.interop.family import Family
from fp8moe.interop.hf_dir import BLOCK, INDEX, SCALE, dequantized
from fp8moe.interop.hf_model import CHUNK
from fp8moe.interop.names import Parameter, Source
from fp8moe.interop.new_directory import check_empty, new_directory
from fp8moe.interop.precision import Fp8Plan
from fp8moe.interop.readers import check_directory
from fp8moe.interop.stored import Stored
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.model.config import ModelConfig
from fp8moe.train.checkpoint.files import LocalFolder
from fp8moe.train.checkpoint.storage import Part, write_safetensors

SHARD = 5_000_000_000  # bytes, at most, but for a tensor that is larger
Output = Literal["bf16", "fp8", "fp32"]


@dataclass(frozen=True)
class Export:
    """What is written: the checkpoint, its model as a family says it, the precision, and where FP8.

    power_of_two: of the scales of weights in the training. served: read by vLLM or SGLang. requantized: filled while
    a model that was imported from block FP8 is written: names of FP8 weights whose codes are not the source's.
    """

    stored: Stored
    family: Family
    config: ModelConfig
    output: Output
    plan: Fp8Plan | None
    power_of_two: bool = False
    served: bool = True
    requantized: set[str] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not FP8."""
        return torch.float32 if self.output == "fp32" else torch.bfloat16

    def parameters(self) -> list[Parameter]:
        """The name map under released names."""
        return self.family.parameters(self.config, False)


def write_directory(export: Export, out: Path, files: Mapping[str, str], keep: Callable[[Path], None]) -> int:
    """Write the directory `out` -> bytes of its tensors. files: texts by name, config.json among them; `keep` adds what
    is copied. Raises ConfigError, DataError and SpaceError; nothing is left then."""
    check_empty(out)
    _check_lengths(export)
    parts = list(_parts(export))
    total = sum(part.num_bytes for part in parts)
    with new_directory(out, total, "the export needs") as folder:
        keep(folder)
        for name, text in files.items():
            write_text(folder / name, text)
        _write_shards(parts, total, folder)
        check_directory(folder, out, served=export.served)
    return total


def _check_lengths(export: Export) -> None:
    for one in export.parameters():
        found = export.stored.length(one.stored_name)
        if found is not None and found != one.length:
            raise DataError(
                f"{export.stored.path}: {one.name} has {found} values and its model {one.length}: verify it"
            )


def _write_shards(parts: list[Part], total: int, folder: Path) -> None:
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(one.num_bytes for one in shards[-1]) + part.num_bytes > SHARD:
            shards.append([])
        shards[-1].append(part)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(LocalFolder(folder), name, shard, {"format": "pt"})
    where = {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2)
    write_text(folder / INDEX, f"{text}\n")


def _parts(export: Export) -> Iterator[Part]:
    """The tensors of the directory, in the order of the model."""
    plain: dict[str, list[tuple[Parameter, Source, int]]] = {}
    for parameter in export.parameters():
        start = 0
        for source in parameter.sources:
            plain.setdefault(source.name, []).append((parameter, source, start))
            start += source.rows * parameter.columns
    copies: dict[str, list[str]] = {}
    for copy, original in export.family.copies(export.config).items():
        copies.setdefault(original, []).append(copy)
    for name, pieces in plain.items():
        if export.plan is not None and name in export.plan.fp8:
            yield from _fp8_parts(export, name, *pieces[0])
            continue
        dtype = torch.float32 if pieces[0][0].is_bias else export.dtype
        for alias in (name, *copies.get(name, ())):
            yield Part(alias, dtype, pieces[0][1].shape, partial(_plain, export.stored, pieces, dtype))


def _plain(stored: Stored, pieces: list[tuple[Parameter, Source, int]], dtype: torch.dtype) -> Tensor:
    """A tensor of the directory, of all parameters' rows that it holds."""
    out = torch.empty(pieces[0][1].shape, dtype=dtype)
    for parameter, source, start in pieces:
        name, count = parameter.stored_name, source.rows * parameter.columns
        target = out if source.expert is None else out[source.expert]
        if source.is_plain:
            flat = target.view(-1)
            for first in range(0, count, CHUNK):
                length = min(CHUNK, count - first)
                flat[first : first + length] = stored.read(name, start + first, length)
            continue
        matrix = target.T if source.transposed else target
        rows = stored.read(name, start, count).view(source.rows, *matrix.shape[1:])
        index = torch.arange(source.rows) if source.order is None else source.order.index(source.rows)
        matrix[index] = rows.to(dtype)
    return out


def _fp8_parts(export: Export, name: str, parameter: Parameter, source: Source, start: int) -> Iterator[Part]:
    """A weight in E4M3 and its scales, which are there when the weight has been written."""
    n, k = source.rows, parameter.columns
    scales = torch.full((-(-n // BLOCK), -(-k // BLOCK)), float("nan"))

    def codes() -> Tensor:
        out = torch.empty(n, k, dtype=torch.float8_e4m3fn)
        band = max(1, CHUNK // k // BLOCK) * BLOCK if source.order is None else n
        for first in range(0, n, band):
            rows = min(band, n - first)
            values = export.stored.read(parameter.stored_name, start + first * k, rows * k).view(rows, k)
            if source.order is not None:  # before the cast: each block's scale is that of its rows there
                values = torch.empty_like(values).index_copy_(0, source.order.index(n), values)
            blocks, _ = quantize_blocks(values.to(torch.bfloat16), power_of_two=export.power_of_two)
            out[first : first + rows] = blocks.data
            _note_requantized(export, name, values, blocks)
            scales[first // BLOCK : first // BLOCK + len(blocks.scale)] = blocks.scale
        return out

    yield Part(name, torch.float8_e4m3fn, (n, k), codes)
    yield Part(name + SCALE, torch.float32, tuple(scales.shape), lambda: scales)


def _note_requantized(export: Export, name: str, values: Tensor, blocks: Fp8Tensor) -> None:
    """Compare FP8 with the source's values, which are overwritten. Codes at a scale of amax/448 come back, their scale
    within the 2^-9 to which BF16 rounds amax; at another scale some value moves by more."""
    if export.requantized is not None:
        moved = dequantized(blocks.data, blocks.scale).sub_(values).abs_()
        if (moved > values.abs_().mul_(2**-7)).any():
            export.requantized.add(name)


def config_of(export: Export, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: what the family says, ids of special tokens, the dtype, what is FP8."""
    name = str(export.dtype).removeprefix("torch.")
    content = {
        "architectures": [export.family.architecture],
        "model_type": export.family.model_type,
        **export.family.write(export.config),
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "use_cache": True,
    }
    if export.plan is not None:
        content["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": export.plan.modules_to_not_convert,
        }
    return content
