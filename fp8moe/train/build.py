"""The only composition root: makes a `Run`, everything that a step uses, from a resolved `TrainConfig`.

First the checkpoint's numbers, so that a wrong one is refused before anything is built; then the data, this rank's
stages of the model, the optimizer, and the checkpoint's tensors. Processes, device and run directory come from
`processes`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn import Parameter

from fp8moe.data.build import Data, open_data
from fp8moe.data.fim import fim_in_words
from fp8moe.data.identity import DataIdentity, check_same_data, content_hash
from fp8moe.data.sampler import Sampler
from fp8moe.layers.attention.choice import chosen
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.model.partition import Stage
from fp8moe.model.stage import pass_parameters
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.context import ContextMessages
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.dispatch.captured import CapturableDispatcher
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.sharding.zero import Zero1
from fp8moe.schedule.build import build_schedule
from fp8moe.train import checkpoint
from fp8moe.train.captured import make_captured
from fp8moe.train.config import TrainConfig, foreign_weights, stages_of
from fp8moe.train.ema import Ema
from fp8moe.train.guard import Guard
from fp8moe.train.kept_reference import KeptReference
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer, whole_matrices
from fp8moe.train.processes import wait_for_all, writing_group
from fp8moe.train.random_state import seed_random
from fp8moe.train.reading import step_reader
from fp8moe.train.run import Run
from fp8moe.train.run_state import begin_from, check_space, perturb_weights, restore


def build(
    config: TrainConfig,
    mesh: Mesh,
    device: torch.device,
    run_dir: Path,
    foreign: checkpoint.OpenForeign = checkpoint.no_foreign,
    open_data: Callable[[TrainConfig, Mesh], Data] | None = None,
) -> Run:
    """Make the run, from the checkpoint that `resume` names where there is one, else from that of `init_from`.

    foreign: opens weights that are no checkpoint's. open_data: what the run reads in place of token files. Collective
    over all ranks.
    """
    path = config.checkpoint.path
    chosen = _chosen(config, mesh, run_dir)
    weights = _weights(config, mesh, foreign) if chosen is None else None
    data = (open_data or open_files)(config, mesh)
    identity = _data_identity(config, data)
    if chosen is not None and chosen[1].data is not None:
        check_same_data(chosen[0], chosen[1].data, identity, config.resume_changes)
    dispatcher = _dispatcher(config, mesh)
    stages = stages_of(config)
    seed_random(config.seed, mesh.rank)
    model = build_model(config, mesh, stages, dispatcher, device)
    zero = make_zero(config, mesh, stages, model)
    optimizer = make_optimizer(config, mesh, model, zero)
    run = Run(
        config=config,
        mesh=mesh,
        device=device,
        run_dir=run_dir,
        data=data,
        identity=identity,
        sampler=Sampler(len(data.train), config.seed),
        reader=step_reader(config, data.train, mesh, device),
        model=model,
        dispatcher=dispatcher,
        stages=stages,
        links=Links(mesh, timedelta(seconds=config.parallel.startup_timeout)),
        optimizer=optimizer,
        zero=zero,
        guard=Guard(config.max_skipped_steps, config.guard),
        saver=checkpoint.Saver(
            checkpoint.root_of(run_dir, path), config.checkpoint, is_first=mesh.rank == 0, group=writing_group(mesh)
        ),
        ema=make_ema(config, optimizer),
        captured=make_captured(config.parallel, model, device, zero),
    )
    if config.data.source == "problems" and config.grpo.kl:
        run.reference = KeptReference(config, mesh, optimizer, run.routers(), foreign)
    run.shapes = _logical_shapes(model, mesh)
    run.loads = {name: torch.zeros_like(router.counts_E) for name, router in run.routers().items()}
    if chosen is not None:
        restore(run, *chosen)
    else:
        _begin(run, weights)
    if path is not None or run_dir.is_dir():
        check_space(run)
    return run


def _begin(run: Run, weights: checkpoint.Location | checkpoint.ForeignWeights | None) -> None:
    """Bring a new run to its step 0, by the weights that `init_from` names where it does. Collective over all ranks."""
    if weights is not None:
        begin_from(run, weights)
    if run.config.init_perturbation:
        perturb_weights(run, run.config.init_perturbation)
    if run.reference is not None:
        run.reference.take(0, 0)


def _chosen(config: TrainConfig, mesh: Mesh, run_dir: Path) -> tuple[checkpoint.Location, checkpoint.RunState] | None:
    """The checkpoint that `resume` names and its numbers; None without. Collective over all ranks."""
    return checkpoint.choose(
        config.resume,
        run_dir,
        config.checkpoint.path,
        config.model,
        mesh,
        seed=config.seed,
        seq_len=config.seq_len,
        optimizer=config.optimizer.kind,
    )


def _weights(
    config: TrainConfig, mesh: Mesh, foreign: checkpoint.OpenForeign
) -> checkpoint.Location | checkpoint.ForeignWeights | None:
    """What `init_from` names; None where it is not set. Collective over all ranks."""
    if config.init_from is None:
        return None
    found = foreign_weights(config, foreign)
    if found is not None:
        return found
    return checkpoint.choose_weights(config.init_from, config.model, mesh, averaged=config.init_from_ema)


def _logical_shapes(model: Transformer, mesh: Mesh) -> dict[str, list[int]]:
    """The shape of every parameter of the whole model with all experts, by name. Collective over all ranks."""
    mine = {name: checkpoint.logical_shape(parameter, mesh) for name, parameter in model.named_parameters()}
    return {name: shape for of_rank in gather(mine, mesh.world_group) for name, shape in of_rank.items()}


def open_files(config: TrainConfig, mesh: Mesh) -> Data:
    """What `config.data` names. Collective over all ranks. Raises ConfigError and DataError."""
    return open_data(
        config.data,
        seq_len=config.seq_len,
        seed=config.seed,
        is_first=mesh.rank == 0,
        barrier=lambda: wait_for_all(mesh),
        validation_samples=config.validation.samples,
    )


def _dispatcher(config: TrainConfig, mesh: Mesh) -> Dispatcher:
    dispatcher = make_dispatcher(
        config.parallel.dispatcher,
        mesh,
        config.model.experts.num_experts,
        chunks=config.parallel.chunks,
        capacity_factor=config.parallel.capacity_factor,
        max_imbalance=config.parallel.max_imbalance,
        max_tokens=config.rank_tokens,
    )
    captured = config.parallel.cuda_graphs and mesh.ep_group is not None
    return CapturableDispatcher(dispatcher) if captured else dispatcher


def _data_identity(config: TrainConfig, data: Data) -> DataIdentity:
    """What a checkpoint keeps of the data that its run reads."""
    return DataIdentity(
        data.train.content(),
        data.validation.content(),
        None if data.tokenizer is None else content_hash(data.tokenizer.path),
        config.data.document_mask,
        config.data.validation_share,
        config.data.packing,
        fim_in_words(config.data),
    )


def build_model(
    config: TrainConfig, mesh: Mesh, stages: tuple[Stage, ...], dispatcher: Dispatcher, device: torch.device
) -> Transformer:
    """The model of this rank's stages, with its initial weights; attention's kernel is chosen, and said, here."""
    context = None if mesh.cp_group is None else ContextMessages(mesh.cp_group)
    model = empty_model(config, mesh.pp_rank, stages, dispatcher, device, context)
    attention, masked = config.model.attention, config.data.document_mask
    heads = attention.heads(config.recipe, masked=masked, parted=config.recipe.gathered)
    chosen(attention.backend, heads, device)
    init_weights(model, config.seed, ep_rank=mesh.ep_rank)
    return model


def empty_model(
    config: TrainConfig,
    pp_rank: int,
    stages: tuple[Stage, ...],
    dispatcher: Dispatcher,
    device: torch.device,
    context: ContextMessages | None = None,
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
            context=context,
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


def make_ema(config: TrainConfig, optimizer: Optimizer | DeepSpeedAdamW) -> Ema | None:
    """The average of the masters that this rank holds, where it is asked for."""
    if config.ema.decay is None:
        return None
    assert isinstance(optimizer, Optimizer), "refused by `config.resolve`"
    return Ema({str(i): master for i, master in enumerate(optimizer.masters())}, config.ema.decay)
