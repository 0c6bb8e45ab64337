"""Which checkpoint a run goes on from: the newest whose bytes are right, and why not a newer one."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fp8moe.errors import DataError
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.checkpoint.folder import candidates
from fp8moe.train.checkpoint.manifest import problems
from fp8moe.train.checkpoint.state import RunState, read_state

logger = logging.getLogger(__name__)


def choose(
    resume: str, run_dir: Path, model: ModelConfig, mesh: Mesh, *, seed: int, seq_len: int, optimizer: str
) -> tuple[Path, RunState] | None:
    """The checkpoint that `resume` means and its numbers; None for a run from step 0. Collective over all ranks.

    Every file is verified before a tensor is read, each rank a share of them. A damaged checkpoint is passed over for
    the one before it, which is said. Raises ConfigError where the right one is of another run, DataError where none is
    good.
    """
    found = candidates(resume, run_dir)
    damaged = []
    for path in found:
        wrong = [
            one for of_rank in gather(problems(path, mesh.rank, mesh.world_size), mesh.world_group) for one in of_rank
        ]
        if not wrong:
            return path, read_state(path, model, seed=seed, seq_len=seq_len, optimizer=optimizer)
        damaged.append(f"{path}: {wrong[0]}")
        logger.warning("damaged checkpoint %s", damaged[-1])
        if mesh.rank == 0:
            print(f"checkpoint {damaged[-1]}; it is damaged and passed over", file=sys.stderr, flush=True)
    if damaged:
        raise DataError(
            f"none of the {len(found)} checkpoints that resume={resume} may use is whole ({'; '.join(damaged)}): use "
            "resume=none and another run_dir to start anew"
        )
    return None


def readable_state(
    resume: str, run_dir: str | None, model: ModelConfig, *, seed: int, seq_len: int, optimizer: str
) -> tuple[Path, RunState] | None:
    """The same before there are processes, by what can be read of the numbers alone; the bytes are verified later."""
    failed: DataError | None = None
    for path in candidates(resume, run_dir):
        try:
            return path, read_state(path, model, seed=seed, seq_len=seq_len, optimizer=optimizer)
        except DataError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return None
