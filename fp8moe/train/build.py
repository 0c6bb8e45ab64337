"""The only composition root: makes a `Run`, everything that a step uses, from a resolved `TrainConfig`.

First the checkpoint's numbers, so that a wrong one is refused before anything is built; then the data, this rank's
stages of the model, the optimizer, the average of the weights, and the checkpoint's tensors: all of them where the run
goes on (`resume`), the weights alone where it begins from them (`init_from`). Processes, device and run directory come
from `processes`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fp8moe.data.build import Data, open_data
from fp8moe.data.identity import DataIdentity, check_same_data, content_hash
from fp8moe.data.sampler import Sampler
from fp8moe.errors import SpaceError
from fp8moe.layers.attention.choice import chosen
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import is_expert, quantize_weights
from fp8moe.layers.router import Router
from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.schedule.build import build_schedule
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.ema import Ema
from fp8moe.train.guard import Guard
from fp8moe.train.optimizer import AdamW
from fp8moe.train.processes import wait_for_all, writing_group
from fp8moe.train.provenance import commit, versions
from fp8moe.train.random_state import is_stored, random_state, seed_random, set_random_state

SPARE = 1.2  # of a checkpoint's size must be free at start: the new one exists before an old one goes
logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts and the state of a run on this rank.

    step: steps done. stages: all of the pipeline's. model: of the stages that this rank holds. ema: the average of its
    weights, where there is one. loads: tokens that each expert has had in the whole run, by name of those stages'
    routers.
    """

    config: TrainConfig
    mesh: Mesh
    device: torch.device
    run_dir: Path
    data: Data
    identity: DataIdentity
    sampler: Sampler
    model: Transformer
    dispatcher: Dispatcher
    stages: tuple[Stage, ...]
    links: Links
    optimizer: AdamW
    guard: Guard
    saver: checkpoint.Saver
    ema: Ema | None
    step: int = 0
    loads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.mesh.rank == 0

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        wait_for_all(self.mesh)

    def routers(self) -> dict[str, Router]:
        """This rank's routers by their canonical names, in the order of the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Router)}


def build(config: TrainConfig, mesh: Mesh, device: torch.device, run_dir: Path) -> Run:
    """Make the run, from the checkpoint that `resume` names where there is one, else from that of `init_from`.

    Collective over all ranks.
    """
    chosen = checkpoint.choose(config.resume, run_dir, config.model, mesh, seed=config.seed, seq_len=config.seq_len)
    weights = None
    if chosen is None and config.init_from is not None:
        weights = checkpoint.choose_weights(config.init_from, config.model, mesh, averaged=config.init_from_ema)
    data = open_data(
        config.data,
        seq_len=config.seq_len,
        seed=config.seed,
        is_first=mesh.rank == 0,
        barrier=lambda: wait_for_all(mesh),
        validation_samples=config.validation.samples,
    )
    identity = _data_identity(config, data)
    if chosen is not None and chosen[1].data is not None:
        check_same_data(chosen[0], chosen[1].data, identity, config.resume_changes)
    dispatcher = make_dispatcher(
        config.parallel.dispatcher,
        mesh,
        config.model.experts.num_experts,
        chunks=config.parallel.chunks,
        capacity_factor=config.parallel.capacity_factor,
        max_imbalance=config.parallel.max_imbalance,
        max_tokens=config.micro_batch * config.seq_len,
    )
    stages = stages_of(config)
    seed_random(config.seed, mesh.rank)
    model = build_model(config, mesh, stages, dispatcher, device)
    optimizer = AdamW(model, model.main_grads, config.optimizer)
    run = Run(
        config=config,
        mesh=mesh,
        device=device,
        run_dir=run_dir,
        data=data,
        identity=identity,
        sampler=Sampler(len(data.train), config.seed),
        model=model,
        dispatcher=dispatcher,
        stages=stages,
        links=Links(mesh, timedelta(seconds=config.parallel.startup_timeout)),
        optimizer=optimizer,
        guard=Guard(config.max_skipped_steps),
        saver=checkpoint.Saver(
            run_dir / "checkpoints", config.checkpoint, is_first=mesh.rank == 0, group=writing_group(mesh)
        ),
        ema=None if config.ema.decay is None else Ema(masters(optimizer), config.ema.decay),
    )
    run.loads = {name: torch.zeros_like(router.counts_E) for name, router in run.routers().items()}
    if chosen is not None:
        _restore(run, *chosen)
    elif weights is not None:
        _begin_from(run, weights)
    if run_dir.is_dir():
        check_space(run)
    return run


def _data_identity(config: TrainConfig, data: Data) -> DataIdentity:
    """What a checkpoint keeps of the data that its run reads."""
    return DataIdentity(
        data.train.content(),
        data.validation.content(),
        None if data.tokenizer is None else content_hash(data.tokenizer.path),
        config.data.document_mask,
        config.data.validation_share,
    )


def build_model(
    config: TrainConfig, mesh: Mesh, stages: tuple[Stage, ...], dispatcher: Dispatcher, device: torch.device
) -> Transformer:
    """The model of this rank's stages, with its initial weights; attention's kernel is chosen, and said, here.

    A rank that holds the MTP module and not the first stage has a copy of the embedding for it.
    """
    parallel = config.parallel
    schedule = build_schedule(parallel.schedule, parallel.pp, config.num_microbatches)
    held = [stages[stage] for stage in sorted({stage for _, stage in schedule.held_by(mesh.pp_rank)})]
    with device:
        model = Transformer(
            config.model,
            config.recipe,
            dispatcher,
            layers=[layer for stage in held for layer in stage.layers],
            embedding=any(stage.embedding or stage.mtp for stage in held),
            head=any(stage.head for stage in held),
        )
    attention = config.model.attention
    chosen(attention.backend, attention.heads(config.recipe, masked=config.data.document_mask), device)
    init_weights(model, config.seed, ep_rank=mesh.ep_rank)
    return model


def tied_embedding(run: Run) -> Tensor | None:
    """The embedding's `main_grad` where two pipeline ranks hold a copy each, on those two; None elsewhere."""
    if run.mesh.tie_group is None:
        return None
    assert run.model.embedding is not None
    main_grad: Tensor = run.model.embedding.weight.main_grad  # type: ignore[attr-defined]
    return main_grad


def masters(optimizer: AdamW) -> dict[str, Tensor]:
    """The FP32 masters that this rank holds, or the pieces of them, by canonical name of the parameter."""
    return {name.removeprefix("master."): t for name, _, t in optimizer.tensors() if name.startswith("master.")}


def state_tensors(
    run: Run,
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    random: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All tensors that a checkpoint of `run` holds, by canonical name; of each, what `held` takes.

    random: states of random generators, which are copies as they come, since generators do not stand still.
    """
    biases = {name: router.bias_E for name, router in run.routers().items()}
    averages = None if run.ema is None else run.ema.tensors()
    tensors = checkpoint.run_tensors(run.optimizer, biases, run.loads, run.mesh, held, averages)
    return tensors | dict(random or {})


def _restore(run: Run, path: Path, state: checkpoint.RunState) -> None:
    """Go on from a checkpoint. An average that it does not hold begins from the masters; one too many is left alone."""
    stored, mesh = checkpoint.stored_names(path), run.mesh
    tensors, random = state_tensors(run), random_state(run.device, mesh.rank)
    averages = {name for name in tensors if name.startswith("ema.")}
    if not averages <= stored:
        logger.info("%s holds no average of the weights: it begins from the masters", path)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in averages}
    same_ranks = is_stored(random, stored, mesh.world_size)
    checkpoint.load(path, tensors | random if same_ranks else tensors, mesh.world_group)
    _refresh(run, restart_average=not averages <= stored)
    if same_ranks:
        set_random_state(random, run.device, mesh.rank)
    else:
        logger.info("%s holds no random states of %d such ranks: they are seeded anew", path, mesh.world_size)
    run.optimizer.updates = state.updates
    run.sampler.consumed = state.consumed
    run.guard.skipped = state.skipped
    run.step = state.step
    logger.info("resumed from %s after step %d, %d samples consumed", path, state.step, state.consumed)


def _begin_from(run: Run, path: Path) -> None:
    """Take the weights of a checkpoint, or their average, and its router biases; all else is a new run's."""
    kind = "ema." if run.config.init_from_ema else "master."
    taken = {name: tensor for name, tensor in state_tensors(run).items() if name.startswith(("master.", "bias."))}
    stored = {name.replace("master.", kind, 1): tensor for name, tensor in taken.items()}
    checkpoint.load(path, stored, run.mesh.world_group)
    _refresh(run, restart_average=True)
    logger.info("begins from the weights of %s (%s*)", path, kind)


def _refresh(run: Run, *, restart_average: bool) -> None:
    """Make what is made of the masters, after they were loaded."""
    run.optimizer.write_parameters()
    quantize_weights(run.model)
    if run.ema is not None and restart_average:
        run.ema.restart()


def check_space(run: Run) -> None:
    """Raise SpaceError unless the run directory has room for a checkpoint. Collective over all ranks.

    What is free counts where rank 0 is: all ranks write to one file system.
    """
    config = run.config.checkpoint
    if not config.at_end and config.every == 0:
        return
    stages, mesh = len(run.mesh.replicas), run.mesh
    copies = {True: mesh.edp * stages, False: mesh.dp * stages}  # ranks that hold the same, of which one writes
    held = [(p, t.numel() * t.element_size()) for _, p, t in run.optimizer.tensors()]
    if run.ema is not None:
        held += [(p, 4 * t.numel()) for name, p, t in run.optimizer.tensors() if name.startswith("master.")]
    mine = sum(size / copies[is_expert(p)] for p, size in held)
    here = shutil.disk_usage(run.run_dir).free if run.is_first else 0
    need, free = all_reduce(torch.tensor([mine, here], dtype=torch.float64), mesh.world_group).tolist()
    if free < SPARE * need:
        raise SpaceError(
            f"{run.run_dir} has {free / 1e9:.2f} GB free and a checkpoint needs {SPARE * need / 1e9:.2f} GB ({SPARE} x "
            f"its {need / 1e9:.2f} GB): free space or name another run_dir"
        )


def start_checkpoint(run: Run) -> None:
    """Begin to write a checkpoint of the run's present state. Collective over all ranks."""
    config = run.config
    state = checkpoint.RunState(
        step=run.step,
        updates=run.optimizer.updates,
        consumed=run.sampler.consumed,
        skipped=run.guard.skipped,
        seed=config.seed,
        seq_len=config.seq_len,
        data=run.identity.as_stored(),
    )
    random = random_state(run.device, run.mesh.rank)  # here: the training draws on while the state is copied
    origin = {"config": asdict(config), "versions": versions(), "commit": commit(), "world_size": run.mesh.world_size}
    run.saver.start(
        run.step, checkpoint.state_text(state, config.model, origin), partial(state_tensors, run, random=random)
    )


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint of the run's present state and wait for it. Collective over all ranks."""
    start_checkpoint(run)
    run.saver.wait()
    return run.saver.finished()[-1]
