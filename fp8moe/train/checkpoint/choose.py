"""Which checkpoint a run goes on or begins from: the newest whose bytes are right, and why not a newer one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from fp8moe.errors import ConfigError, DataError
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.checkpoint.folder import candidates, checkpoints_at, stored_names
from fp8moe.train.checkpoint.manifest import problems
from fp8moe.train.checkpoint.state import RunState, read_state

logger = logging.getLogger(__name__)


def choose(
    resume: str, run_dir: Path, model: ModelConfig, mesh: Mesh, *, seed: int, seq_len: int
) -> tuple[Path, RunState] | None:
    """The checkpoint that `resume` means and its numbers; None for a run from step 0. Collective over all ranks.

    Every file is verified before a tensor is read, each rank a share of them. A damaged checkpoint is passed over for
    the one before it, which is said. Raises ConfigError where the right one is of another run, DataError where none is
    good.
    """
    advice = "use resume=none and another run_dir to start anew"
    path = _whole(f"resume={resume}", candidates(resume, run_dir), mesh, advice)
    return None if path is None else (path, read_state(path, model, seed=seed, seq_len=seq_len))


def choose_weights(init_from: str, model: ModelConfig, mesh: Mesh, *, averaged: bool) -> Path:
    """The checkpoint whose weights, or their average, a new run of `model` begins from. Collective over all ranks.

    Verified likewise; seed, data and seq_len may be others. Raises ConfigError and DataError as `choose` does.
    """
    key = f"init_from={init_from}"
    path = _whole(key, checkpoints_at(init_from, "init_from"), mesh, "name another run or checkpoint")
    assert path is not None, "checkpoints_at gives at least one"
    _check_weights(path, model, averaged)
    return path


def _whole(key: str, found: list[Path], mesh: Mesh, advice: str) -> Path | None:
    """The first of `found` that is not damaged; None of none. Raises DataError where all are."""
    damaged = []
    for path in found:
        wrong = [
            one for of_rank in gather(problems(path, mesh.rank, mesh.world_size), mesh.world_group) for one in of_rank
        ]
        if not wrong:
            return path
        damaged.append(f"{path}: {wrong[0]}")
        logger.warning("damaged checkpoint %s", damaged[-1])
        if mesh.rank == 0:
            print(f"checkpoint {damaged[-1]}; it is damaged and passed over", file=sys.stderr, flush=True)
    if damaged:
        raise DataError(
            f"none of the {len(found)} checkpoints that {key} may use is whole ({'; '.join(damaged)}): {advice}"
        )
    return None


def _check_weights(path: Path, model: ModelConfig, averaged: bool) -> None:
    read_state(path, model)
    if averaged and not any(name.startswith("ema.") for name in stored_names(path)):
        raise ConfigError(
            f"{path} holds no average of the weights, which init_from_ema=true asks for: use init_from_ema=false"
        )


def readable_state(
    resume: str, run_dir: str | None, model: ModelConfig, *, seed: int, seq_len: int
) -> tuple[Path, RunState] | None:
    """The same before there are processes, by what can be read of the numbers alone; the bytes are verified later."""
    states = []

    def read(path: Path) -> None:
        states.append(read_state(path, model, seed=seed, seq_len=seq_len))

    path = _first_readable(candidates(resume, run_dir), read)
    return None if path is None else (path, states[0])


def readable_weights(init_from: str, model: ModelConfig, *, averaged: bool) -> None:
    """Raise, before there are processes, what `choose_weights` would of the numbers."""
    _first_readable(checkpoints_at(init_from, "init_from"), lambda path: _check_weights(path, model, averaged))


def _first_readable(found: list[Path], read: Callable[[Path], None]) -> Path | None:
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
