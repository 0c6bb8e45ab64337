"""The folder of a run's checkpoints: how one is written and named when it is whole, which ones stay, which is found.

    checkpoints/latest                     the name of the newest
    checkpoints/step-N/state.json          numbers, the model's and the run's configuration: read before anything else
    checkpoints/step-N/rank-R.safetensors  masters, moments, averages (ema.NAME), router biases, loads so far, random
                                           states (`storage`), and index.json
    checkpoints/step-N/manifest.json       size and hash of all of these (`manifest`), written last

A checkpoint is written as `step-N.tmp`; rank 0 renames it when every file of every rank is on disk, then `latest`
moves, then old ones are deleted. Expert tensors are handed over as DTensors sharded over ep and replicated over the
ranks with the same experts, so each expert is written once and any ep can resume any other; blocks are named by their
number in the whole model, so a pipeline's ranks write one checkpoint. BF16 weights are not saved: they are the masters
rounded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from fp8moe.errors import ConfigError, DataError
from fp8moe.train.checkpoint.config import CheckpointConfig
from fp8moe.train.checkpoint.manifest import MANIFEST_FILE, write_manifest
from fp8moe.train.checkpoint.state import STATE_FILE
from fp8moe.train.checkpoint.storage import INDEX_FILE, SafetensorsReader, SafetensorsWriter, read_index, write_bytes

# "... in a single process", which is meant. For good: filters within a block are the process's, not the thread's.
warnings.filterwarnings("ignore", message=".*assuming the intent is to.*", module="torch.distributed.checkpoint.*")
STEP_NAME = re.compile(r"step-(\d+)")
LATEST = "latest"


def save(
    root: Path,
    step: int,
    state: str,
    tensors: Mapping[str, Tensor],
    *,
    kept: CheckpointConfig,
    is_first: bool,
    group: dist.ProcessGroup | None,
) -> Path:
    """Write `root/step-N`, whose state.json is `state`, and delete what `kept` does not keep. Collective over `group`.

    Raises DataError, on every rank, where a file can't be written; what was there before stays.
    """
    final, scratch = root / f"step-{step}", root / f"step-{step}.tmp"
    with _one_sentence(final, group):
        _on_first(is_first, group, lambda: _new_folder(scratch))
        writer = SafetensorsWriter(scratch)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)

        def publish() -> None:
            files = writer.files | {STATE_FILE: write_bytes(scratch / STATE_FILE, state.encode())}
            write_manifest(scratch, files)
            if final.exists():  # a run that was resumed from before this step saves it again
                shutil.rmtree(final)
            _sync(scratch)
            scratch.rename(final)
            write_bytes(root / f"{LATEST}.tmp", f"{final.name}\n".encode())
            (root / f"{LATEST}.tmp").replace(root / LATEST)
            _sync(root)
            for old in superseded(complete(root), kept):
                shutil.rmtree(old, ignore_errors=True)

        _on_first(is_first, group, publish)
    return final


def superseded(paths: list[Path], kept: CheckpointConfig) -> list[Path]:
    """Those of `paths`, oldest first, that are neither among the newest `keep` nor a multiple of `keep_every` steps."""
    return [path for path in paths[: -kept.keep] if not kept.stays(_step(path))]


def _step(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _new_folder(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _on_first(is_first: bool, group: dist.ProcessGroup | None, work: Callable[[], None]) -> None:
    """Do `work` on the first rank while the others wait; its OSError is raised on all."""
    outcome: list[OSError | None] = [None]
    if is_first:
        try:
            work()
        except OSError as error:
            outcome = [error]
    if group is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


@contextlib.contextmanager
def _one_sentence(path: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn what goes wrong while writing into a DataError; torch's CheckpointException derives from BaseException."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"checkpoint {path} can't be written ({error.strerror or error}): free space or name another run_dir; the "
            "checkpoints before it are as they were"
        ) from error
    except dcp.api.CheckpointException as failed:
        rank, wrapped = next(iter(failed.failures.items()))
        reason = str(wrapped[0]) if isinstance(wrapped, tuple) else str(wrapped)
        raise DataError(
            f"checkpoint {path} can't be written (rank {rank}: {reason.strip().splitlines()[-1][:200]}): free space or "
            "name another run_dir; the checkpoints before it are as they were"
        ) from failed


def complete(root: Path) -> list[Path]:
    """Checkpoints below `root` that were finished, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def is_complete(path: Path) -> bool:
    """Whether a folder is a checkpoint that was finished; whether its bytes are right is `manifest.problems`."""
    return (path / MANIFEST_FILE).is_file()


def candidates(resume: str, run_dir: str | Path | None) -> list[Path]:
    """The checkpoints that `resume` may go on from, the best first: [] for "none", and for "auto" where there is none.

    A path may be a checkpoint, which is then the only one, or a run directory. Raises ConfigError when it is neither,
    and for "required" where there is none.
    """
    if resume == "none":
        return []
    if resume in ("auto", "required"):
        found = complete(Path(run_dir) / "checkpoints") if run_dir is not None else []
        if resume == "required" and not found:
            raise ConfigError(f"resume=required and run_dir={run_dir} holds no complete checkpoint: use resume=auto")
        return found[::-1]
    return checkpoints_at(resume, "resume")


def checkpoints_at(name: str, key: str) -> list[Path]:
    """The complete checkpoints at the path `name`, the newest first. Raises ConfigError, in terms of `key`, of none."""
    path = Path(name)
    if is_complete(path):
        return [path]
    if inside := complete(path / "checkpoints"):
        return inside[::-1]
    old = path if (path / ".metadata").is_file() else next((path / "checkpoints").glob("step-*/.metadata"), None)
    if old is not None:
        raise ConfigError(
            f"{key}={name} is a checkpoint of format 2 or earlier, without a {MANIFEST_FILE}, and this version "
            "reads format 3: use the version that wrote it"
        )
    raise ConfigError(f"{key}={name} holds no complete checkpoint: name a run directory or its checkpoints/step-N")


def stored_names(path: Path) -> set[str]:
    """Names of the tensors that a checkpoint holds. Raises DataError where its index can't be read."""
    try:
        return set(read_index(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}/{INDEX_FILE} can't be read ({error!r}): use another checkpoint") from error


def find(resume: str, run_dir: str | Path | None) -> Path | None:
    """The first of `candidates`; None where there is none."""
    return next(iter(candidates(resume, run_dir)), None)


def load(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors`, named as they were saved, on any layout of ranks. Collective over `group`. Verify first."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(
            dict(tensors),
            storage_reader=SafetensorsReader(path),
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        raise DataError(f"{path} can't be read ({reason}): resume from another checkpoint") from error


def _sync(folder: Path) -> None:
    """Wait until the names in `folder` are on disk; its files were synchronized when they were closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
