"""The only composition root: makes a `Run`, everything that a step uses, from a resolved `TrainConfig`.

First the checkpoint's numbers, so that a wrong one is refused before anything is built; then the data, this rank's
stages of the model, the optimizer, and the checkpoint's tensors. Processes, device and run directory come from
`processes`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.data.build import Data, open_data
from fp8moe.data.identity import DataIdentity, check_same_data, content_hash
from fp8moe.data.sampler import Sampler
from fp8moe.layers.attention.choice import chosen
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import QuantizedWeight, is_expert
from fp8moe.layers.router import Router
from fp8moe.model.partition import Stage
from fp8moe.model.stage import pass_parameters
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.zero import Zero1
from fp8moe.schedule.build import build_schedule
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.guard import Guard
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer, whole_matrices
from fp8moe.train.optimizer.state import Held
from fp8moe.train.processes import wait_for_all, writing_group
from fp8moe.train.provenance import commit, versions

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts and the state of a run on this rank.

    step: steps done. stages: all of the pipeline's. model: of the stages that this rank holds. zero: what shards the
    optimizer's state among replicas; None where each keeps it whole. loads: tokens that each expert has had in the
    whole run, by name of those stages' routers.
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
    optimizer: Optimizer | DeepSpeedAdamW
    zero: Zero1 | None
    guard: Guard
    saver: checkpoint.Saver
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
    """Make the run, from the checkpoint that `resume` names where there is one. Collective over all ranks."""
    path = config.checkpoint.path
    chosen = checkpoint.choose(
        config.resume,
        run_dir,
        path,
        config.model,
        mesh,
        seed=config.seed,
        seq_len=config.seq_len,
        optimizer=config.optimizer.kind,
    )
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
    model = build_model(config, mesh, stages, dispatcher, device)
    zero = make_zero(config, mesh, stages, model)
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
        optimizer=make_optimizer(config, mesh, model, zero),
        zero=zero,
        guard=Guard(config.max_skipped_steps),
        saver=checkpoint.Saver(
            checkpoint.root_of(run_dir, path), config.checkpoint, is_first=mesh.rank == 0, group=writing_group(mesh)
        ),
    )
    run.loads = {name: torch.zeros_like(router.counts_E) for name, router in run.routers().items()}
    if chosen is not None:
        _restore(run, *chosen)
    if path is not None or run_dir.is_dir():
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
    """The model of this rank's stages, with its initial weights; attention's kernel is chosen, and said, here."""
    model = empty_model(config, mesh.pp_rank, stages, dispatcher, device)
    attention = config.model.attention
    chosen(attention.backend, attention.heads(config.recipe, masked=config.data.document_mask), device)
    init_weights(model, config.seed, ep_rank=mesh.ep_rank)
    return model


def empty_model(
    config: TrainConfig, pp_rank: int, stages: tuple[Stage, ...], dispatcher: Dispatcher, device: torch.device
) -> Transformer:
    """The model of a pipeline rank's stages without weights, on any device.

    A rank that holds the MTP module and not the first stage has a copy of the embedding for it.
    """
    held = [stages[stage] for stage in held_stages(config, pp_rank)]
    with device:
        return Transformer(
            config.model,
            config.recipe,
            dispatcher,
            layers=[layer for stage in held for layer in stage.layers],
            embedding=any(stage.embedding or stage.mtp for stage in held),
            head=any(stage.head for stage in held),
        )


def held_stages(config: TrainConfig, pp_rank: int) -> list[int]:
    """The stages of a pipeline rank, in order."""
    parallel = config.parallel
    schedule = build_schedule(parallel.schedule, parallel.pp, config.num_microbatches)
    return sorted({stage for _, stage in schedule.held_by(pp_rank)})


def make_zero(config: TrainConfig, mesh: Mesh, stages: tuple[Stage, ...], model: Transformer) -> Zero1 | None:
    """What shards the optimizer's state; None where it is not asked for, and where no parameter has another replica."""
    if config.optimizer.sharding in ("none", "deepspeed") or mesh.dense_group is None:
        return None
    held = held_stages(config, mesh.pp_rank)
    passes = {(s, i): fed for s in held for i, fed in enumerate(pass_parameters(model, stages[s]))}
    return Zero1(
        model.main_grads,
        list(model.parameters()),
        mesh,
        passes,
        quantized={m.weight: m for m in model.modules() if isinstance(m, QuantizedWeight)},
        matrices=whole_matrices(config.optimizer),
        tied=None if mesh.tie_group is None else tied_embedding(model),
    )


def make_optimizer(
    config: TrainConfig, mesh: Mesh, model: Transformer, zero: Zero1 | None
) -> Optimizer | DeepSpeedAdamW:
    """The optimizer that `config.optimizer` names. Collective over all ranks."""
    if config.optimizer.sharding == "deepspeed":
        return DeepSpeedAdamW(model, model.main_grads, config.optimizer, mesh)
    return Optimizer(model, model.main_grads, config.optimizer, zero)


def tied_embedding(model: Transformer) -> Parameter:
    """The embedding of a rank that shares it with another pipeline rank, where each holds a copy."""
    assert model.embedding is not None
    return model.embedding.weight


def state_tensors(
    run: Run, take: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Tensor | checkpoint.Pieces]:
    """All tensors that a checkpoint of `run` holds, by canonical name; of each, what `take` makes."""
    return _tensors_of(run, run.optimizer.held, take)


def _tensors_of(
    run: Run, held: Mapping[str, list[Held]], take: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Tensor | checkpoint.Pieces]:
    biases = {name: router.bias_E for name, router in run.routers().items()}
    return checkpoint.run_tensors(held, biases, run.loads, run.mesh, take)


def _restore(run: Run, path: checkpoint.Location, state: checkpoint.RunState) -> None:
    held = run.optimizer.held
    checkpoint.load(path, _tensors_of(run, held), run.mesh.world_group)
    if isinstance(run.optimizer, DeepSpeedAdamW):  # what it holds are copies
        run.optimizer.load(held)
    run.optimizer.updates = state.updates
    run.optimizer.write_parameters()
    run.sampler.consumed = state.consumed
    run.guard.skipped = state.skipped
    run.step = state.step
    logger.info("resumed from %s after step %d, %d samples consumed", path, state.step, state.consumed)


def check_space(run: Run) -> None:
    """Raise ConfigError or SpaceError unless a checkpoint can be written and has room. Collective over all ranks.

    What is free counts where rank 0 is: all ranks write to one file system.
    """
    config = run.config.checkpoint
    if not config.at_end and config.every == 0:
        return
    mine = sum(
        tensor.numel() * tensor.element_size() / _copies(run, one.parameter)
        for ranges in run.optimizer.held.values()
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
        optimizer=config.optimizer.kind,
        data=run.identity.as_stored(),
    )
    origin = {"config": asdict(config), "versions": versions(), "commit": commit(), "world_size": run.mesh.world_size}
    run.saver.start(run.step, checkpoint.state_text(state, config.model, origin), partial(state_tensors, run))


def save_checkpoint(run: Run) -> checkpoint.Location:
    """Write a checkpoint of the run's present state and wait for it. Collective over all ranks."""
    start_checkpoint(run)
    run.saver.wait()
    return run.saver.finished()[-1]
