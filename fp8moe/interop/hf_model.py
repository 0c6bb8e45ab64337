"""A Hugging Face directory as a model of ours: every tensor accounted for, and any range of any master on request.

All checks come when it is opened, from the shards' headers: each parameter has its sources in the right shape, each
tensor is used or named in `left_out` with the reason, and none is unknown. Values come by ranges of the flattened
parameter, as a rank of any layout holds them, so nobody reads what it does not keep; at most 64 MB or one row is read
at once, or one matrix where its rows are to be reordered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fp8moe.errors import ConfigError, DataError
from fp8moe.interop.families import read_config
from fp8moe.interop.family import Family, mtp_layer
from fp8moe.interop.hf_dir import HfDirectory, is_hf_directory
from fp8moe.interop.names import Parameter, Source
from fp8moe.model.config import ModelConfig
from fp8moe.train.checkpoint import Pieces
from fp8moe.train.checkpoint.state import differences, extended

CHUNK = 1 << 24  # values read at once
Mtp = Literal["auto", "keep", "drop"]


@dataclass(frozen=True)
class HfModel:
    """What `open_model` gives: the model, the directory, its config.json, parameters by the names a checkpoint has.

    left_out: tensors that are not used, with the reason. copies: those that must equal a used one, by its name, and are
    compared when that is read. notes: what the user should know.
    """

    family: Family
    config: ModelConfig
    directory: HfDirectory
    values: Mapping[str, Any]
    parameters: dict[str, Parameter]
    left_out: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fill(self, name: str, first: int, out: Tensor) -> None:
        """Put values [first, first + n) of the flattened parameter `name` into out FP32 [n]."""
        parameter = self.parameters[name]
        if not parameter.sources:
            out.zero_()
            return
        k, start = parameter.columns, 0
        for source in parameter.sources:
            stop = start + source.rows * k
            if start < first + len(out) and stop > first:
                begin, end = max(start, first), min(stop, first + len(out))
                self._fill_from(source, k, begin - start, out[begin - first : end - first])
            start = stop

    def _fill_from(self, source: Source, k: int, first: int, out: Tensor) -> None:
        step = max(1, CHUNK // k) if source.is_plain else source.rows
        row, done = first // k, 0
        while done < len(out):
            skipped = first + done - row * k
            end = min(source.rows, row + step, -(-(first + len(out)) // k))
            values = self._rows(source, row, end).flatten()[skipped:][: len(out) - done]
            out[done : done + len(values)] = values
            row, done = end, done + len(values)

    def _rows(self, source: Source, first: int, stop: int) -> Tensor:
        """Rows [first, stop) of what a source gives, FP32 [n, K] or [n]."""
        if source.is_plain:
            values = self.directory.rows(source.name, first, stop, source.expert)
            copy = self.copies.get(source.name)
            if copy is not None and not torch.equal(values, self.directory.rows(copy, first, stop)):
                raise DataError(
                    f"{self.directory.folder}: {copy} differs from {source.name}, which the MTP module shares here, "
                    "and would be lost: leave the module out, with --mtp drop or model.mtp_depth=0"
                )
            return values
        shape = source.shape if source.expert is None else source.shape[1:]
        whole = self.directory.rows(source.name, 0, shape[0], source.expert)
        whole = whole.T if source.transposed else whole
        return (whole if source.order is None else whole[source.order.index(source.rows)])[first:stop]

    def load(self, tensors: Mapping[str, Tensor | Pieces]) -> None:
        """Fill tensors that are named as in a checkpoint, or the ranges of them that a rank holds."""
        for name, wanted in tensors.items():
            ranges = wanted.ranges if isinstance(wanted, Pieces) else ((0, wanted),)
            for offset, values in ranges:
                flat = torch.empty(values.numel())
                self.fill(name, offset, flat)
                values.copy_(flat.view(values.shape))

    def bytes_of(self, name: str, first: int, stop: int) -> int:
        """Bytes of the directory's tensors that values [first, stop) of a parameter are made of, scales left out."""
        parameter, start, found = self.parameters[name], 0, 0
        for source in parameter.sources:
            end = start + source.rows * parameter.columns
            common = min(end, stop) - max(start, first)
            if common > 0:
                found += common * self.directory.itemsize(source.name)
            start = end
        return found

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError unless a run's model is this one, free settings and a context extension apart."""
        theirs, ours = json.loads(json.dumps(asdict(self.config))), json.loads(json.dumps(asdict(model)))
        found = sorted(differences(extended(theirs, ours), ours), key=lambda one: not one[0].endswith("kind"))
        if found:
            key, there, here = found[0]
            more = ""
            if len(found) > 1:
                others = f"{len(found) - 1} more to be changed"
                more = f", {others}, or all of its settings: fp8moe import makes a run of them, which --from takes"
            raise ConfigError(
                f"init_from={self.directory.folder} has model.{key}={there} and this run has {here}: use {there}{more}"
            )


def open_released(name: str, model: ModelConfig) -> HfModel | None:
    """The released model at a path, its MTP module where `model` has one; None where there is no such directory."""
    if "://" in name or not is_hf_directory(Path(name)):
        return None
    return open_model(Path(name), "auto" if model.mtp_depth else "drop")


def open_model(folder: Path, mtp: Mtp = "auto") -> HfModel:
    """The model of a Hugging Face directory. mtp: keep its MTP module (an error without one), drop it, or keep one that
    is there. Raises ConfigError and DataError."""
    family, config, values = read_config(folder)
    directory = HfDirectory(folder, values)
    notes: list[str] = []
    config = replace(config, mtp_depth=_mtp_depth(config, directory, mtp, notes, family))
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in directory.entries)
    found = family.parameters(config, fused)
    _check_sources(directory, found)
    model = HfModel(family, config, directory, values, {one.stored_name: one for one in found}, notes=notes)
    _account(model)
    return model


def _mtp_depth(config: ModelConfig, directory: HfDirectory, mtp: Mtp, notes: list[str], family: Family) -> int:
    layers = {mtp_layer(name, config.num_layers) for name in directory.entries} - {None}
    if mtp == "keep" and not layers:
        raise ConfigError(f"--mtp keep and {directory.folder} holds no layer {config.num_layers}: use --mtp drop")
    if config.mtp_depth and not layers and mtp == "auto":
        notes.append("config.json announces an MTP module, the files hold none: it is left out")
    if layers and mtp == "auto" and not family.copies(replace(config, mtp_depth=1)):
        return 0
    return int(bool(layers) and mtp != "drop")


def _check_sources(directory: HfDirectory, found: list[Parameter]) -> None:
    sources = {source.name: source for one in found for source in one.sources}
    missing = [name for name in sources if name not in directory.entries]
    if missing:
        raise DataError(
            f"{directory.folder} lacks {len(missing)} of the {len(sources)} tensors of its model, the first is "
            f"{missing[0]}: use the released files"
        )
    for name, source in sources.items():
        shape = directory.entries[name].shape
        if shape != source.shape:
            raise DataError(
                f"{directory.folder}: {name} is {list(shape)} and config.json makes it {list(source.shape)}: use the "
                "released files"
            )


def _account(model: HfModel) -> None:
    """Find the reason of every tensor that no parameter uses. Raises DataError where there is none."""
    directory = model.directory
    used = {source.name for one in model.parameters.values() for source in one.sources}
    copies = model.family.copies(model.config)
    unknown = []
    for name in directory.entries:
        base = name.removesuffix("_scale_inv") if directory.is_scale(name) else name
        layer = mtp_layer(name, model.config.num_layers)
        if base in used:
            continue
        if name.endswith("rotary_emb.inv_freq"):
            model.left_out[name] = "the rotation's frequencies, which config.json gives"
        elif layer is not None and layer >= model.config.num_layers + model.config.mtp_depth:
            model.left_out[name] = f"the MTP module of layer {layer}"
        elif name in copies:
            model.copies[copies[name]] = name
            model.left_out[name] = f"a copy of {copies[name]}"
        else:
            unknown.append(name)
    if unknown:
        raise DataError(
            f"{directory.folder} holds {len(unknown)} tensors that {model.family.model_type} has no place for, the "
            f"first is {unknown[0]}: what they do would be lost"
        )
