"""The folder of a run's checkpoints: how one is written and named when it is whole, which ones stay, how one is loaded.

    checkpoints/latest                     the name of the newest
    checkpoints/step-N/state.json          numbers, the model's and the run's configuration: read before anything else
    checkpoints/step-N/rank-R.safetensors  masters, moments, averages (ema.NAME), a reference (reference.NAME), router
                                           biases, loads so far, random states (`storage`), and index.json
    checkpoints/step-N/manifest.json       size and hash of all of these (`manifest`), written last

On a local disk a checkpoint is written as `step-N.tmp`; rank 0 renames it when every file of every rank is on disk.
Behind a URL there is no rename, and the manifest alone makes it count (`files`). Then `latest` moves, then old ones are
deleted: of those up to this step, since a later one is damaged, or the run would have gone on from it. Blocks are named
by their number in the whole model, experts stacked, and what a rank holds is handed over as ranges (`pieces`), so that
any layout can resume any other. BF16 weights are not saved: they are the masters rounded.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from fp8moe.data.durable import unwritable
from fp8moe.errors import ConfigError, DataError, SpaceError
from fp8moe.parallel.place import rank_in_words
from fp8moe.train.checkpoint.config import CheckpointConfig
from fp8moe.train.checkpoint.files import Folder, clear, delete, folder_of, reason, write_bytes, writing_problem
from fp8moe.train.checkpoint.location import Location
from fp8moe.train.checkpoint.manifest import MANIFEST_FILE, write_manifest
from fp8moe.train.checkpoint.pieces import Pieces
from fp8moe.train.checkpoint.state import STATE_FILE
from fp8moe.train.checkpoint.storage import INDEX_FILE, read_index

STEP_NAME = re.compile(r"step-(\d+)")
LATEST = "latest"
SPARE = 1.2  # of a checkpoint's size must be free at start: the new one exists before an old one goes
logger = logging.getLogger(__name__)


def save(
    root: Location,
    step: int,
    state: str,
    tensors: Mapping[str, Tensor | Pieces],
    *,
    kept: CheckpointConfig,
    is_first: bool,
    group: dist.ProcessGroup | None,
) -> Location:
    """Write `root/step-N`, whose state.json is `state`, and delete what `kept` does not keep. Collective over `group`.

    Raises SpaceError, on every rank, where the disk is full, DataError where a file can't be written otherwise;
    what was there before stays, and what was written goes.
    """
    from fp8moe.train.checkpoint import torch_checkpoint

    final = folder_of(root / f"step-{step}")
    written = final.written_as()
    with _one_sentence(final.where), _removed_on_error(written, is_first):
        _on_first(is_first, group, lambda: clear(written, first=MANIFEST_FILE))
        files = torch_checkpoint.write(written, tensors, group)

        def publish() -> None:
            write_manifest(written, files | {STATE_FILE: write_bytes(written, STATE_FILE, state.encode())})
            final.publish(written)  # type: ignore[arg-type]
            folder_of(root).replace(LATEST, f"{final.where.name}\n".encode())
            for old in superseded(complete(root), kept, step):
                try:
                    delete(folder_of(old), last=MANIFEST_FILE)
                except OSError as error:
                    logger.warning("the old checkpoint %s can't be deleted (%s)", old, error)

        _on_first(is_first, group, publish)
    return final.where


def superseded(paths: Sequence[Location], kept: CheckpointConfig, step: int) -> list[Location]:
    """Those of `paths`, oldest first, up to `step`, but for the last `keep` and multiples of `keep_every`."""
    until = [path for path in paths if step_of(path) <= step]
    return [path for path in until[: -kept.keep] if not kept.stays(step_of(path))]


def step_of(path: Location) -> int:
    """The number in a checkpoint's name."""
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


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


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


@contextlib.contextmanager
def _one_sentence(path: Location) -> Iterator[None]:
    """Turn what goes wrong while writing into a SpaceError or a DataError; torch's CheckpointException derives from
    BaseException."""
    from fp8moe.train.checkpoint.torch_checkpoint import CheckpointException

    advice = "free space or name another run_dir or checkpoint.path; the checkpoints before it are as they were"
    try:
        yield
    except OSError as error:
        raise unwritable(f"checkpoint {path}", error, advice) from error
    except CheckpointException as failed:
        rank, wrapped = next(iter(failed.failures.items()))
        cause = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        number = cause.errno if isinstance(cause, OSError) else None
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else _last_line(cause)
        raise unwritable(f"checkpoint {path}", OSError(number, f"{rank_in_words(rank)}: {reason}"), advice) from failed


@contextlib.contextmanager
def _removed_on_error(written: Folder, is_first: bool) -> Iterator[None]:
    """Delete what a save that failed has written, unless it is whole: it would keep the disk full."""
    from fp8moe.train.checkpoint.torch_checkpoint import CheckpointException

    try:
        yield
    except (OSError, CheckpointException):
        with contextlib.suppress(OSError):
            if is_first and not written.has(MANIFEST_FILE):
                delete(written, last=MANIFEST_FILE)
        raise


def complete(root: Location) -> list[Location]:
    """Checkpoints below `root` that were finished, oldest first."""
    found = [root / name for name in folder_of(root).names() if STEP_NAME.fullmatch(name)]
    return [path for path in sorted(found, key=step_of) if is_complete(path)]


def is_complete(path: Location) -> bool:
    """Whether a folder is a checkpoint that was finished; whether its bytes are right is `manifest.problems`."""
    return folder_of(path).has(MANIFEST_FILE)


def refusal(root: Location, need: float) -> ConfigError | SpaceError | None:
    """Why checkpoints of `need` bytes can't be written to `root`, to be raised on all ranks; None where they can."""
    problem, free = writing_problem(root), folder_of(root).free()
    if free < SPARE * need:
        return SpaceError(
            f"{root} has {free / 1e9:.3g} GB free and a checkpoint needs {SPARE * need / 1e9:.3g} GB ({SPARE} x its "
            f"{need / 1e9:.3g} GB): free space or name another run_dir or checkpoint.path"
        )
    if problem is not None:
        return ConfigError(f"no file can be written to {root} ({problem}): use another run_dir or checkpoint.path")
    return None


def stored_names(path: Location) -> set[str]:
    """Names of the tensors that a checkpoint holds. Raises DataError where its index can't be read."""
    try:
        return set(read_index(folder_of(path)))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}/{INDEX_FILE} can't be read ({reason(error)}): use another checkpoint") from error


def load(path: Location, tensors: Mapping[str, Tensor | Pieces], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors`, named as they were saved, on any layout of ranks. Collective over `group`. Verify first."""
    from fp8moe.train.checkpoint import torch_checkpoint

    try:
        torch_checkpoint.read(folder_of(path), tensors, group)
    except (OSError, RuntimeError, ValueError, KeyError, torch_checkpoint.CheckpointException) as error:
        raise DataError(f"{path} can't be read ({_last_line(error)}): resume from another checkpoint") from error
