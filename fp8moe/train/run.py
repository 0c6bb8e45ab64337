"""A run on one rank: its parts, made by `build`, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fp8moe.data.build import Data
from fp8moe.data.identity import DataIdentity
from fp8moe.data.prefetch import Prefetcher
from fp8moe.data.sampler import Sampler
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.router import Router
from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.sharding.zero import Zero1
from fp8moe.train import checkpoint
from fp8moe.train.captured import CapturedMicroBatch
from fp8moe.train.config import TrainConfig
from fp8moe.train.ema import Ema
from fp8moe.train.guard import Guard
from fp8moe.train.kept_reference import KeptReference
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer
from fp8moe.train.preempt import Preemption
from fp8moe.train.processes import wait_for_all
from fp8moe.train.reading import StepBatches


@dataclass(frozen=True)
class SavePoint:
    """What of a run's state changes before the update does, as it was at the end of a step: numbers, random states.

    ready: on a GPU, when the update of that step has run.
    """

    state: checkpoint.RunState
    random: dict[str, Tensor]
    ready: torch.cuda.Event | None


@dataclass
class Run:
    """The parts and the state of a run on this rank.

    step: steps done. reader: gives the batches of a step. stages: all of the pipeline's. model: of the stages that this
    rank holds. zero: what shards the optimizer's state among replicas; None where each keeps it whole. ema: the average
    of the weights, where there is one. captured: what runs micro-batches as a CUDA graph. reference: earlier weights
    that a policy is held near. save_is_due: a checkpoint is owed for this step, or for one before that was skipped.
    loads: tokens that each expert has had in the whole run, by name of those stages' routers. point: the end of the
    last step, which a preempted run saves. shapes: of all parameters of the whole model, with all experts, for
    checkpoints.
    """

    config: TrainConfig
    mesh: Mesh
    device: torch.device
    run_dir: Path
    data: Data
    identity: DataIdentity
    sampler: Sampler
    reader: Prefetcher[StepBatches]
    model: Transformer
    dispatcher: Dispatcher
    stages: tuple[Stage, ...]
    links: Links
    optimizer: Optimizer | DeepSpeedAdamW
    zero: Zero1 | None
    guard: Guard
    saver: checkpoint.Saver
    ema: Ema | None
    captured: CapturedMicroBatch | None = None
    reference: KeptReference | None = None
    step: int = 0
    save_is_due: bool = False
    loads: dict[str, Tensor] = field(default_factory=dict)
    preemption: Preemption = field(default_factory=Preemption)
    point: SavePoint | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.mesh.rank == 0

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        wait_for_all(self.mesh)

    def routers(self) -> dict[str, Router]:
        """This rank's routers by their canonical names, in the order of the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Router)}
