"""Which checkpoints there are for a run, and where it keeps its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from fp8moe.errors import ConfigError, DataError
from fp8moe.train.checkpoint.files import folder_of
from fp8moe.train.checkpoint.folder import LATEST, complete, is_complete, step_of
from fp8moe.train.checkpoint.location import Location, location
from fp8moe.train.checkpoint.manifest import MANIFEST_FILE
from fp8moe.train.checkpoint.state import FORMAT

FOLDER = "checkpoints"  # of a run directory
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def looking_up(what: str) -> Iterator[None]:
    """Raise DataError where the storage refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{what} can't be looked up ({reason}): check its address and the access to it") from error


def below(path: Location) -> list[Location]:
    """The complete checkpoints of `path`, a run directory or the folder of its checkpoints, oldest first."""
    return complete(path / FOLDER) or complete(path)


def root_of(run_dir: str | Path, path: str | None) -> Location:
    """Where a run keeps its checkpoints: `path` (`checkpoint.path`), or below its run directory."""
    return Path(run_dir) / FOLDER if path is None else location(path)


def _of_run(run_dir: str | Path, path: str | None) -> list[Location]:
    """A run's complete checkpoints, the newest first: at `path`, and those that it wrote before it was given one."""
    found = complete(Path(run_dir) / FOLDER)
    if path is not None:
        found += complete(location(path))
    return sorted(found, key=step_of)[::-1]


def candidates(resume: str, run_dir: str | Path | None, path: str | None = None) -> list[Location]:
    """The checkpoints that `resume` may go on from, the best first: [] for "none", and for "auto" where there is none.

    A path or URL may be a checkpoint, which is then the only one, a run directory or a folder of checkpoints. path:
    `checkpoint.path`, which holds those of `run_dir`. Raises ConfigError when it is neither, and for "required" where
    there is none, DataError where it can't be looked up.
    """
    with looking_up(f"resume={resume}"):
        return _candidates(resume, run_dir, path)


def _candidates(resume: str, run_dir: str | Path | None, path: str | None) -> list[Location]:
    if resume == "none":
        return []
    if resume in ("auto", "required"):
        found = [] if run_dir is None else _of_run(run_dir, path)
        if resume == "required" and not found:
            raise ConfigError(f"resume=required and run_dir={run_dir} holds no complete checkpoint: use resume=auto")
        return found
    where = location(resume)
    in_place = run_dir is not None and where.resolve() == Path(run_dir).resolve()
    if in_place and (found := _of_run(str(run_dir), path)):
        return found
    return _at(where, f"resume={resume}")


def checkpoints_at(name: str, key: str) -> list[Location]:
    """The complete checkpoints at a path or URL, the newest first, at least one; `key` is the setting that names it.

    Raises ConfigError and DataError as `candidates` does.
    """
    with looking_up(f"{key}={name}"):
        return _at(location(name), f"{key}={name}")


def _at(where: Location, said: str) -> list[Location]:
    if is_complete(where):
        return [where]
    if inside := below(where)[::-1]:
        return inside
    if _is_old(where):
        raise ConfigError(
            f"{said} is a checkpoint of format 2 or earlier, without a {MANIFEST_FILE}, and this version reads format "
            f"{FORMAT}: use the version that wrote it"
        )
    raise ConfigError(none_at(where, said))


def none_at(where: Location, said: str) -> str:
    """The sentence on a place without a checkpoint; said: how it was named."""
    if isinstance(where, Path) and not where.exists():
        return f"{said} does not exist: name a run directory or its checkpoints/step-N"
    one = _run_below(where)
    advice = "name a run directory or its checkpoints/step-N" if one is None else f"name a run in it, such as {one}"
    return f"{said} holds no complete checkpoint: {advice}"


def _run_below(where: Location) -> Path | None:
    """The newest run directory with a checkpoint in the folder `where`."""
    if not isinstance(where, Path) or not where.is_dir():
        return None
    found = [latest.parent.parent for latest in where.glob(f"*/{FOLDER}/{LATEST}")]
    return max(found, key=lambda one: (one / FOLDER / LATEST).stat().st_mtime, default=None)


def _is_old(where: Location) -> bool:
    """Whether this is a checkpoint of format 2 or earlier, or a run with one."""
    if folder_of(where).has(".metadata"):
        return True
    root = where / FOLDER
    return any(folder_of(root / name).has(".metadata") for name in folder_of(root).names())


def find(resume: str, run_dir: str | Path | None, path: str | None = None) -> Location | None:
    """The first of `candidates`; None where there is none."""
    return next(iter(candidates(resume, run_dir, path)), None)


def check_root(path: str | None, run_dir: str | Path | None, resume: str) -> None:
    """Raise ConfigError where `checkpoint.path` holds checkpoints and the run that starts does not go on from one."""
    if path is None or resume in ("auto", "required"):
        return
    with looking_up(f"checkpoint.path={path}"):
        there = complete(location(path))
    if not there:
        return
    root, resumed = location(path).resolve(), candidates(resume, run_dir, path)
    if not resumed or resumed[0].parent.resolve() != root:
        raise ConfigError(
            f"checkpoint.path={path} holds {len(there)} checkpoints and a fresh run needs a folder without: use "
            "resume=auto to go on, or another checkpoint.path"
        )
