"""What of a run is saved, and how it comes back: tensors, numbers, random states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.errors import ConfigError
from fp8moe.layers.linear import is_expert
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.train import checkpoint
from fp8moe.train.kept_reference import KeptReference
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer
from fp8moe.train.optimizer.state import Held
from fp8moe.train.perturbation import perturb
from fp8moe.train.provenance import commit, versions
from fp8moe.train.random_state import is_stored, random_state, set_random_state
from fp8moe.train.run import Run, SavePoint

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor | checkpoint.Pieces]


def state_tensors(
    run: Run,
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    random: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """All tensors that a checkpoint of `run` holds, by canonical name; of each, what `take` makes.

    random: states of random generators, which are copies as they come, since generators do not stand still.
    """
    kept = _saved_reference(run)
    reference = {} if kept is None else kept.tensors(take)
    return _tensors(run, run.optimizer.held, take) | reference | dict(random or {})


def _tensors(
    run: Run, held: Mapping[str, list[Held]], take: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensors:
    biases = {name: router.bias_E for name, router in run.routers().items()}
    tensors = checkpoint.run_tensors(held, biases, run.loads, run.mesh, take)
    return tensors | checkpoint.run_tensors(_averages(run), {}, {}, run.mesh, take)


def _averages(run: Run) -> dict[str, list[Held]]:
    """The average of the weights that this rank holds; nothing where there is none."""
    if run.ema is None:
        return {}
    assert isinstance(run.optimizer, Optimizer), "DeepSpeed's masters are not averaged"
    return run.optimizer.named("ema", list(run.ema.tensors().values()))


def _saved_reference(run: Run) -> KeptReference | None:
    """The reference, where it is part of the run's checkpoints."""
    return run.reference if run.reference is not None and run.reference.is_saved else None


def restore(run: Run, path: checkpoint.Location, state: checkpoint.RunState) -> None:
    """Go on from a checkpoint. An average that it does not hold begins from the masters; one too many is left alone.

    Collective over all ranks.
    """
    stored, mesh, held = checkpoint.stored_names(path), run.mesh, run.optimizer.held
    tensors, random = _tensors(run, held), random_state(run.device, mesh.rank)
    if not any(name in stored for name in tensors if not name.startswith(("master.", "ema.", "bias.", "load."))):
        raise ConfigError(f"{path} holds weights and no state of an optimizer: begin a run from it, init_from={path}")
    averages = {name for name in tensors if name.startswith("ema.")}
    if not averages <= stored:
        logger.info("%s holds no average of the weights: it begins from the masters", path)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in averages}
    same_ranks = is_stored(random, stored, mesh.world_size)
    checkpoint.load(path, tensors | random if same_ranks else tensors, mesh.world_group)
    _refresh(run, held, restart_average=not averages <= stored)
    if run.reference is not None:
        run.reference.restore(path, stored)
    if same_ranks:
        set_random_state(random, run.device, mesh.rank)
    else:
        logger.info("%s holds no random states of %d such ranks: they are seeded anew", path, mesh.world_size)
    run.optimizer.updates = state.updates
    run.sampler.consumed = state.consumed
    run.guard.skipped, run.guard.in_a_row = state.skipped, state.skipped_in_a_row
    run.step = state.step
    logger.info("resumed from %s after step %d, %d samples consumed", path, state.step, state.consumed)


def begin_from(run: Run, path: checkpoint.Location | checkpoint.ForeignWeights) -> None:
    """Take the weights of a checkpoint, or their average, or other weights, with router biases; all else is new.

    Collective over all ranks.
    """
    kind, held = "ema." if run.config.init_from_ema else "master.", run.optimizer.held
    taken = {name: tensor for name, tensor in _tensors(run, held).items() if name.startswith(("master.", "bias."))}
    stored = {name.replace("master.", kind, 1): tensor for name, tensor in taken.items()}
    if isinstance(path, checkpoint.Location):
        checkpoint.load(path, stored, run.mesh.world_group)
    else:
        path.load(stored)
    _refresh(run, held, restart_average=True)
    logger.info("begins from the weights of %s (%s*)", run.config.init_from, kind)


def perturb_weights(run: Run, size: float) -> None:
    """Multiply each weight by 1 + size or 1 - size (`perturbation`). Collective over all ranks."""
    held = run.optimizer.held
    perturb(held, size, seed=run.config.seed, ep_rank=run.mesh.ep_rank)
    _refresh(run, held, restart_average=True)
    logger.info("each initial weight was changed by %g of it", size)


def _refresh(run: Run, held: Mapping[str, list[Held]], *, restart_average: bool) -> None:
    """Make what is made of the masters, after they were loaded into `held`."""
    if isinstance(run.optimizer, DeepSpeedAdamW):  # what it holds are copies
        run.optimizer.load(held)
    run.optimizer.write_parameters()
    if run.ema is not None and restart_average:
        run.ema.restart()


def check_space(run: Run) -> None:
    """Raise SpaceError or ConfigError unless a checkpoint can be written. Collective over all ranks.

    What is free counts where rank 0 is: all ranks write to one file system.
    """
    config = run.config.checkpoint
    if not config.at_end and config.every == 0:
        return
    kept = _saved_reference(run)
    mine = sum(
        tensor.numel() * tensor.element_size() / _copies(run, one.parameter)
        for found in (run.optimizer.held, _averages(run), {} if kept is None else kept.held())
        for ranges in found.values()
        for one in ranges
        for tensor in one.tensors.values()
    )
    need = float(all_reduce(torch.tensor([mine], dtype=torch.float64), run.mesh.world_group))
    refused = gather(checkpoint.refusal(run.saver.root, need) if run.is_first else None, run.mesh.world_group)[0]
    if refused is not None:
        raise refused


def _copies(run: Run, parameter: Parameter) -> int:
    """Ranks that hold the same range of a parameter, of which one writes it."""
    mesh, expert = run.mesh, is_expert(parameter)
    group = mesh.expert_group if expert else mesh.dense_group
    return 1 if group is None or run.zero is not None else group.size()


def save_point(run: Run) -> SavePoint:
    """The end of the step just done, from which a checkpoint may be written until the next update."""
    state = checkpoint.RunState(
        step=run.step,
        updates=run.optimizer.updates,
        consumed=run.sampler.consumed,
        skipped=run.guard.skipped,
        seed=run.config.seed,
        seq_len=run.config.seq_len,
        optimizer=run.config.optimizer.kind,
        skipped_in_a_row=run.guard.in_a_row,
        data=run.identity.as_stored(),
    )
    ready = torch.cuda.current_stream().record_event() if run.device.type == "cuda" else None
    return SavePoint(state, random_state(run.device, run.mesh.rank), ready)


def start_checkpoint(run: Run, point: SavePoint | None = None) -> None:
    """Begin to write a checkpoint of the run's present state, or as it was at `point`. Collective over all ranks.

    Raises NonFiniteError where the state of the checkpoint before was not finite, or is now and training waits for the
    save: nothing is written then. With a `point` nothing but the saver's group is used, since the training may stand
    within a collective of any other.
    """
    config, at = run.config, point or save_point(run)
    origin = {
        "config": asdict(config),
        "versions": versions(),
        "commit": commit(),
        "world_size": run.mesh.world_size,
        "shapes": run.shapes,
    }
    run.saver.start(
        at.state.step,
        checkpoint.state_text(at.state, config.model, origin),
        partial(state_tensors, run, random=at.random),
        None if point is None else point.ready,
    )


def save_and_stop(run: Run, first: int) -> str:
    """Write a checkpoint of `run.point` unless there is one, and wait for it -> what was done, in words.

    first: the step that this start of the run began after. Collective over all ranks.
    """
    assert run.point is not None
    config, step = run.config.checkpoint, run.point.state.step
    if not config.at_end and config.every == 0:
        return f"nothing is saved of step {step}, as checkpoint.every=0 and checkpoint.at_end=false ask"
    if run.point.state.skipped_in_a_row:
        return f"nothing is saved of step {step}, which was skipped; resume={run.run_dir} goes on from before it"
    if step not in (first, run.saver.newest):
        start_checkpoint(run, run.point)
    run.saver.close()
    if run.saver.newest is None:
        return f"no step was done since step {first}"
    return f"step {run.saver.newest} is saved, resume={run.run_dir} goes on"


def save_checkpoint(run: Run) -> checkpoint.Location:
    """Write a checkpoint of the run's present state and wait for it. Collective over all ranks."""
    start_checkpoint(run)
    run.saver.close()
    return run.saver.finished()[-1]
