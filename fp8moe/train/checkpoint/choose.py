"""Which checkpoint a run goes on or begins from: the newest whose bytes are right, and why not a newer one."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from fp8moe.errors import ConfigError, DataError
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.checkpoint.folder import stored_names
from fp8moe.train.checkpoint.location import Location
from fp8moe.train.checkpoint.manifest import problems
from fp8moe.train.checkpoint.search import candidates, checkpoints_at
from fp8moe.train.checkpoint.state import RunState, read_state

logger = logging.getLogger(__name__)


def choose(
    resume: str,
    run_dir: Path,
    path: str | None,
    model: ModelConfig,
    mesh: Mesh,
    *,
    seed: int,
    seq_len: int,
    optimizer: str,
) -> tuple[Location, RunState] | None:
    """The checkpoint that `resume` means and its numbers; None for a run from step 0. Collective over all ranks.

    Every file is verified before a tensor is read, each rank a share of them. A damaged checkpoint is passed over for
    the one before it, which is said. Raises ConfigError where the right one is of another run, DataError where none is
    good.
    """
    advice = "use resume=none and another run_dir to start anew"
    found = _whole(f"resume={resume}", candidates(resume, run_dir, path), mesh, advice)
    if found is None:
        return None
    return found, read_state(found, model, seed=seed, seq_len=seq_len, optimizer=optimizer)


def choose_weights(
    init_from: str, model: ModelConfig, mesh: Mesh, *, averaged: bool, key: str = "init_from"
) -> Location:
    """The checkpoint whose weights, or their average, a new run of `model` begins from. Collective over all ranks.

    key: what names it, for messages. Verified likewise; seed, data and seq_len may be others, and YaRN where `model`
    has it. Raises ConfigError and DataError as `choose` does.
    """
    found = checkpoints_at(init_from, key)
    path = _whole(f"{key}={init_from}", found, mesh, "name another run or checkpoint")
    assert path is not None, "checkpoints_at gives at least one"
    _check_weights(path, model, averaged)
    return path


def _whole(key: str, found: list[Location], mesh: Mesh, advice: str) -> Location | None:
    """The first of `found` that is not damaged; None of none. Raises DataError where all are."""
    damaged: list[str] = []
    for path in found:
        shares = gather(problems(path, mesh.rank, mesh.world_size), mesh.world_group)
        wrong = [problem for share in shares for problem in share]
        if not wrong:
            if damaged and mesh.rank == 0:
                for one in damaged:
                    print(f"checkpoint {one}; it is damaged and passed over", file=sys.stderr)
                print(f"checkpoint {path} is whole and taken in its place", file=sys.stderr, flush=True)
            return path
        damaged.append(f"{path}: {wrong[0]}")
        logger.info("damaged checkpoint %s", damaged[-1])  # no warning, which a command without a log file prints
    if damaged:
        raise DataError(
            f"none of the {len(found)} checkpoints that {key} may use is whole ({'; '.join(damaged)}): {advice}"
        )
    return None


def _like_its_run(path: Location, init_from: str) -> str:
    """The words that begin a run with the settings of the run of a checkpoint; none where it is in no run directory."""
    run = path.absolute().parent.parent if isinstance(path, Path) else None
    if run is None or not (run / "config.yaml").is_file():
        return ""
    return f"all of its run's by {shlex.join(['--from', init_from, f'init_from={init_from}'])}"


def _check_weights(path: Location, model: ModelConfig, averaged: bool, advice: str = "") -> None:
    read_state(path, model, extending=True, advice=advice)
    if averaged and not any(name.startswith("ema.") for name in stored_names(path)):
        raise ConfigError(
            f"{path} holds no average of the weights, which init_from_ema=true asks for: use init_from_ema=false"
        )


def readable_state(
    resume: str, run_dir: str | None, path: str | None, model: ModelConfig, *, seed: int, seq_len: int, optimizer: str
) -> tuple[Location, RunState] | None:
    """The same before there are processes, by what can be read of the numbers alone; the bytes are verified later."""
    states = []

    def read(one: Location) -> None:
        states.append(read_state(one, model, seed=seed, seq_len=seq_len, optimizer=optimizer))

    found = _first_readable(candidates(resume, run_dir, path), read)
    return None if found is None else (found, states[0])


def readable_weights(init_from: str, model: ModelConfig, *, averaged: bool) -> None:
    """Raise, before there are processes, what `choose_weights` would of the numbers."""
    found = checkpoints_at(init_from, "init_from")
    _first_readable(found, lambda path: _check_weights(path, model, averaged, _like_its_run(path, init_from)))


def _first_readable(found: list[Location], read: Callable[[Location], None]) -> Location | None:
    """The first of `found` that `read` does not refuse with a DataError; None of none. Raises the first where all."""
    failed: DataError | None = None
    for path in found:
        try:
            read(path)
        except DataError as error:
            failed = failed or error
        else:
            return path
    if failed is not None:
        raise failed
    return None
