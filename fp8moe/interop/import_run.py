"""A released model as a run directory: config.yaml, tokenizer.json, FP32 masters and router biases in step-0.

It is written beside its place and renamed, so that it is whole or absent. Values are read, widened and written in parts
of at most 64 MB, or of one matrix where rows are reordered: the host holds a part, its source and the headers, whatever
the model's size (`MOST_MEMORY`, which a test measures). There are no moments: a run begins from it with `init_from`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fp8moe.data.durable import copy_file, write_text
from fp8moe.interop.hf_model import CHUNK, HfModel
from fp8moe.interop.names import Parameter
from fp8moe.interop.new_directory import new_directory
from fp8moe.interop.tokenizer_files import KEPT, TOKENIZER, keep
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint.computed import write_computed
from fp8moe.train.checkpoint.storage import Part
from fp8moe.train.config import TrainConfig
from fp8moe.train.provenance import commit, versions

MOST_MEMORY = 1 << 28  # bytes of host memory beside the largest tensor: a part, its source, a mapping, headers


def write_run(model: HfModel, out: Path, config: TrainConfig, text: str, tokenizer: Path | None) -> None:
    """Write the run directory `out`. text: `config` as YAML. Raises ConfigError, DataError and SpaceError."""
    need = 4 * sum(one.length for one in model.parameters.values())
    with new_directory(out, need, "the masters need") as folder:
        keep(model.directory.folder, folder / KEPT)
        write_text(folder / "config.yaml", text)
        if tokenizer is not None:
            copy_file(tokenizer, folder / TOKENIZER)
        tensors = {name: list(_parts(model, one)) for name, one in model.parameters.items()}
        write_computed(folder / "checkpoints", 0, _state(model, config), tensors)


def _parts(model: HfModel, parameter: Parameter) -> Iterator[Part]:
    """A parameter cut at its sources, and each plain source into parts of CHUNK values."""
    rows = [(source.rows, source.is_plain) for source in parameter.sources] or [(parameter.shape[0], True)]
    start = 0
    for count, is_plain in rows:
        stop = start + count * parameter.columns
        step = CHUNK if is_plain else stop - start
        for first in range(start, stop, step):
            length = min(step, stop - first)
            name = parameter.stored_name
            part = name if length == parameter.length else f"{name}@{first}"
            yield Part(part, torch.float32, (length,), partial(_values, model, name, first, length))
        start = stop


def _values(model: HfModel, name: str, first: int, length: int) -> Tensor:
    values = torch.empty(length)
    model.fill(name, first, values)
    return values


def _state(model: HfModel, config: TrainConfig) -> str:
    state = checkpoint.RunState(
        step=0,
        updates=0,
        consumed=0,
        skipped=0,
        seed=config.seed,
        seq_len=config.seq_len,
        optimizer=config.optimizer.kind,
    )
    shapes = {one.name: list(one.shape) for one in model.parameters.values() if not one.is_bias}
    origin = {
        "config": asdict(config),
        "versions": versions(),
        "commit": commit(),
        "world_size": 1,
        "shapes": shapes,
        "imported_from": model.directory.folder.name,
    }
    return checkpoint.state_text(state, config.model, origin)
