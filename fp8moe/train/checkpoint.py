"""Checkpoints: saved and resumed by torch.distributed.checkpoint, one name for one logical tensor on any layout.

    step-N/state.json    step, consumed samples, seed, updates, the model's configuration: read before anything else
    step-N/.metadata     torch's index
    step-N/*.distcp      masters, moments, router biases, loads so far

Expert tensors are handed over as DTensors sharded over ep and replicated over the ranks with the same experts, so torch
writes each expert once and any ep can resume any other; the rest is replicated, and torch writes it once. Blocks are
named by their number in the whole model, so a pipeline's ranks write one checkpoint and any other layout reads it. The
BF16 weights are not saved: they are the masters rounded. A checkpoint is written as `step-N.tmp` and renamed by rank 0
when all ranks are done and its bytes are on disk, so a directory without the suffix is complete. What would make the
resumed run another run (model, seed, seq_len) is compared first and refused in one sentence, before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fp8moe.errors import ConfigError, DataError
from fp8moe.layers.linear import is_expert
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.optimizer import AdamW

FORMAT = 2  # 1 held the model's configuration in one flat list of fields
STEP_NAME = re.compile(r"step-(\d+)")
# Fields of the model's configuration that a resumed run may change: no tensor's shape or meaning depends on them.
FREE_FIELDS = {
    *("attention.backend", "router.force_balance", "router.aux_loss_alpha", "router.bias_gamma"),
    *("mtp_weight", "init_std", "max_seq_len"),
}


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept.

    every: steps between checkpoints (0: none before the end). at_end: one after the last step. keep: how many stay.
    """

    every: int = 0
    at_end: bool = True
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must be at least 0: use 0 for none before the end")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1: use 1 for the newest alone")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save after step number `step` (from 1) of `steps`."""
        return (self.at_end and step == steps) or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class RunState:
    """Numbers of a checkpoint: steps and updates done, samples consumed, steps skipped, the run's seed and seq_len.

    data: the identity of its data (`data.identity`); None in checkpoints that were written without.
    """

    step: int
    updates: int
    consumed: int
    skipped: int
    seed: int
    seq_len: int
    data: dict[str, Any] | None = None


def save(
    root: Path,
    state: RunState,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    keep: int,
    is_first: bool,
    barrier: Callable[[], None],
) -> Path:
    """Write `root/step-N` and delete all but the newest `keep`. Collective over all ranks; `is_first` on rank 0."""
    final, scratch = root / f"step-{state.step}", root / f"step-{state.step}.tmp"
    if is_first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    barrier()
    _quietly(dcp.save, dict(tensors), scratch)
    if is_first:
        content = {"format": FORMAT, **asdict(state), "model": asdict(model)}
        (scratch / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if final.exists():  # a run that was resumed from before this step saves it again
            shutil.rmtree(final)
        _sync(scratch)
        scratch.rename(final)
        for old in complete(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def complete(root: Path) -> list[Path]:
    """Checkpoints below `root` that were finished, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / "state.json").is_file() and (path / ".metadata").is_file()]


def find(resume: str, run_dir: str | Path | None) -> Path | None:
    """The checkpoint that `resume` names: None for "none", and for "auto" where there is none yet.

    A path may be a checkpoint or a run directory, which means its newest. Raises ConfigError when it is neither, and
    for "required" where there is none.
    """
    if resume == "none":
        return None
    if resume in ("auto", "required"):
        newest = complete(Path(run_dir) / "checkpoints")[-1:] if run_dir is not None else []
        if resume == "required" and not newest:
            raise ConfigError(f"resume=required and run_dir={run_dir} holds no complete checkpoint: use resume=auto")
        return newest[0] if newest else None
    path = Path(resume)
    if (path / "state.json").is_file() and (path / ".metadata").is_file():
        return path
    if inside := complete(path / "checkpoints"):
        return inside[-1]
    raise ConfigError(f"resume={resume} holds no complete checkpoint: name a run directory or its checkpoints/step-N")


def read_state(path: Path, model: ModelConfig, *, seed: int, seq_len: int) -> RunState:
    """Numbers of the checkpoint at `path`. Raises ConfigError unless its format, model, seed and seq_len are these."""
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _check_format(path, content["format"])
        numbers = [field.name for field in dataclasses.fields(RunState) if field.name != "data"]
        state = RunState(**{name: content[name] for name in numbers}, data=content.get("data"))
        theirs = dict(content["model"])
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/state.json can't be read ({error!r}): resume from another checkpoint") from error
    ours = json.loads(json.dumps(asdict(model)))
    differing = [f"model.{key}={there} there and {here} here" for key, there, here in _differences(theirs, ours)]
    if differing:
        raise ConfigError(
            f"{path} is a checkpoint of another model: {', '.join(differing)}; use its own model settings"
        )
    for name, here, there in (("seed", seed, state.seed), ("seq_len", seq_len, state.seq_len)):
        if here != there:
            raise ConfigError(f"{path} was trained with {name}={there} and this run has {name}={here}: use {there}")
    return state


def _check_format(path: Path, found: int) -> None:
    if found != FORMAT:
        raise ConfigError(
            f"checkpoint format {found} is of {'an earlier' if found < FORMAT else 'a later'} version, which this one "
            f"cannot load: {path} needs the version that wrote it, this one reads format {FORMAT}; use resume=none to "
            "start a new run"
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, their value, our value) of every field that differs and is not free, in order of the keys."""
    for name in sorted(theirs.keys() | ours.keys()):
        key, there, here = f"{group}{name}", theirs.get(name), ours.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{key}.")
        elif there != here and key not in FREE_FIELDS:
            yield key, repr(there), repr(here)


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, named as they were saved, on any layout of ranks. Collective over all ranks."""
    try:
        _quietly(dcp.load, dict(tensors), path)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise DataError(f"{path} can't be read ({reason}): resume from another checkpoint") from error


def run_tensors(
    optimizer: AdamW, biases: Mapping[str, Tensor], loads: Mapping[str, Tensor], mesh: Mesh
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by canonical name: the optimizer's, router biases, tokens each expert has had."""
    tensors = {name: _as_stored(tensor, parameter, mesh) for name, parameter, tensor in optimizer.tensors()}
    tensors |= {f"bias.{name}": bias for name, bias in biases.items()}
    return tensors | {f"load.{name}": load for name, load in loads.items()}


def _as_stored(tensor: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    if mesh.ep == 1 or not is_expert(parameter):  # type: ignore[arg-type]
        return tensor
    ranks = torch.cat([torch.arange(r * mesh.dp, (r + 1) * mesh.dp).view(mesh.edp, mesh.ep) for r in mesh.replicas])
    # Without process groups: nothing is communicated through these DTensors, they only say which rank holds what.
    axes = DeviceMesh(tensor.device.type, ranks, mesh_dim_names=("edp", "ep"), _init_backend=False)
    return DTensor.from_local(tensor, axes, [Replicate(), Shard(0)], run_check=False)


def _quietly(operation: Callable[..., Any], tensors: dict[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")  # "... save in a single process"
        operation(tensors, checkpoint_id=path)


def _sync(folder: Path) -> None:
    """Wait until the files of `folder` are on disk, so that a rename never makes an incomplete checkpoint visible."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
