"""Rollback: where training can't go on (`train.guard`), all ranks go back to the last checkpoint without a restart.

Weights, optimizer, router biases, averages and random states are the checkpoint's. The sampler stays ahead: samples
since the checkpoint are not read again, since one of them may be the cause. `Guard` bounds the rollbacks to one
checkpoint; past the bound, without a checkpoint, or under guard.then=stop the run ends with exit code 5.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from fp8moe.errors import NonFiniteError
from fp8moe.train import checkpoint
from fp8moe.train.processes import end_startup
from fp8moe.train.run import Run
from fp8moe.train.run_state import restore

ADVICE = "resume from the last checkpoint with a lower optimizer.schedule.peak, or try precision=bf16"
ANEW = "start anew with a lower optimizer.schedule.peak, or try precision=bf16"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """From after step `step` to the checkpoint at `path`; samples [first, stop) were used since and count no more."""

    problem: str
    step: int
    path: checkpoint.Location
    first: int
    stop: int

    def __str__(self) -> str:
        return f"{self.problem}: goes on from {self.path}, behind samples {self.first} to {self.stop - 1}"


def roll_back(run: Run) -> Rollback:
    """Go back to the last whole checkpoint because of the guard's problem. Collective over all ranks.

    Raises NonFiniteError where that is not to be done.
    """
    guard, parallel = run.guard, run.config.parallel
    problem = guard.problem
    assert problem is not None
    with contextlib.suppress(NonFiniteError):  # whose state is left behind as well
        run.saver.wait()
    if guard.config.then == "stop":
        raise NonFiniteError(f"{problem}: {ADVICE}")
    end_startup(run.mesh, run.links, parallel.startup_timeout)  # reading a checkpoint takes as long as it did at start
    chosen = _last_checkpoint(run)
    if chosen is None:
        raise NonFiniteError(f"{problem}, and there is no checkpoint to go back to: {ANEW}")
    path, state = chosen
    if not guard.may_return_to(state.step):
        raise NonFiniteError(
            f"{problem}, and {guard.config.max_rollbacks} rollbacks to {path} brought no checkpoint after it: {ADVICE}"
        )
    step, consumed, skipped = run.step, run.sampler.consumed, guard.skipped
    if run.zero is not None:
        run.zero.wait_weights()
    restore(run, path, state)
    run.sampler.consumed, guard.skipped = consumed, skipped
    guard.returned_to(state.step)
    end_startup(run.mesh, run.links, parallel.timeout)
    return Rollback(problem, step, path, state.consumed, consumed)


def last_step_skipped(run: Run) -> NonFiniteError:
    """The error of a run whose last step was skipped. Collective over all ranks."""
    said = f"step {run.step}, the run's last, was skipped, so it is not saved"
    if _last_checkpoint(run) is None:
        return NonFiniteError(f"{said}, and there is no checkpoint: {ANEW}")
    return NonFiniteError(f"{said}: {ADVICE}")


def _last_checkpoint(run: Run) -> tuple[checkpoint.Location, checkpoint.RunState] | None:
    """This run's newest whole checkpoint; that which it was resumed from while it has none of its own."""
    config = run.config
    for resume in dict.fromkeys(("auto", config.resume)):
        found = checkpoint.choose(
            resume,
            run.run_dir,
            config.checkpoint.path,
            config.model,
            run.mesh,
            seed=config.seed,
            seq_len=config.seq_len,
            optimizer=config.optimizer.kind,
        )
        if found is not None:
            return found
    return None
