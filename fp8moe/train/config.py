"""The configuration of a run: one frozen dataclass a concern, each beside its consumer, composed here.

What can be known before a process group exists is checked here, in `resolve`, so that a mistake costs one sentence and
not the start of a thousand processes. `resolve` also fills in what depends on the number of processes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from fp8moe.data.identity import CHANGES
from fp8moe.data.sources import DataConfig
from fp8moe.errors import ConfigError
from fp8moe.kernels.backend import set_backend
from fp8moe.layers.recipe import DEFAULT_RECOMPUTE, Precision, Recipe, Recompute, Scales
from fp8moe.limits import COUNT, POSITIVE, Range, check_fields
from fp8moe.model.config import ModelConfig
from fp8moe.model.partition import Stage, partition
from fp8moe.parallel.config import ParallelConfig
from fp8moe.parallel.dispatch.deep_ep import check_deep_ep
from fp8moe.parallel.mesh import ranks_in_node, validate_mesh
from fp8moe.schedule.build import FOLDED, microbatches, num_stages
from fp8moe.train import checkpoint
from fp8moe.train.batch import BatchConfig, check_parts, check_tokens, data_ranks_in_words, resolve_batch
from fp8moe.train.captured import check_captured
from fp8moe.train.checkpoint import CheckpointConfig
from fp8moe.train.distill_config import DistillConfig
from fp8moe.train.ema import EmaConfig
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.guard import GuardConfig
from fp8moe.train.optimizer import OptimizerConfig, check_deepspeed
from fp8moe.train.run_dir import check_name, check_run_dir
from fp8moe.train.trackers import LoggingConfig, check_trackers
from fp8moe.train.unread import check_unread
from fp8moe.train.validation import ValidationConfig


@dataclass(frozen=True)
class PrecisionConfig:
    """Number format of the model's matrix products, and the kernels that compute them."""

    mode: Precision  # of the model (`fp8moe.layers.recipe`)
    # of the kernels: reference, triton, gluon, cublas, deepgemm or te; None: FP8MOE_BACKEND, then the device's
    backend: str | None = None
    # of FP8 tensors: recipe (the published mixture), fp32 (wherever it can be) or power_of_two (everywhere)
    scales: Scales = Scales.RECIPE

    def __post_init__(self) -> None:
        check_fields(self, "precision")
        if self.scales is not Scales.RECIPE and self.mode is not Precision.FP8:
            raise ValueError(
                f"precision.scales={self.scales} concerns FP8 tensors and precision.mode is {self.mode}: use "
                "precision=fp8, or precision.scales=recipe"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. After `resolve`, parallel.dp, parallel.ep and batch.micro_batch are filled in."""

    model: ModelConfig  # the transformer
    data: DataConfig  # what it reads
    precision: PrecisionConfig  # number format of the matrix products
    parallel: ParallelConfig  # sizes of the mesh and how ranks communicate
    optimizer: OptimizerConfig  # the optimizer and the learning rate
    logging: LoggingConfig  # how often progress is shown, and what is measured
    batch: BatchConfig  # sizes of the global batch and of a micro-batch
    validation: ValidationConfig  # when the model is scored on held-out text
    checkpoint: CheckpointConfig  # when checkpoints are saved, where, and how many stay
    name: str  # of the run, in its directory's name; None: the experiment's or the model's
    steps: int  # optimizer steps in all; with epochs they follow from the data
    seq_len: int  # tokens that a sequence predicts
    # passes over the training data, which set steps; None: steps counts. Typing steps alone takes epochs back
    epochs: float | None = None
    seed: int = 0  # of the initial weights and the order of the data
    run_dir: str | None = None  # where the run writes; None: runs/TIME-NAME
    # none; auto or required (from run_dir's newest complete checkpoint: auto starts anew without one); or the
    # path or URL of a run or checkpoint
    resume: str = "none"
    ema: EmaConfig = field(default_factory=EmaConfig)  # an average of the weights, on the host
    # a run, checkpoint or Hugging Face directory whose weights and router biases a run begins from at step 0,
    # unless `resume` finds one to go on from
    init_from: str | None = None
    init_from_ema: bool = False  # the average of the weights of init_from in their place
    # each weight that a new run begins from is multiplied by 1 + this or 1 - this, at random (`train.perturbation`)
    init_perturbation: float = 0.0
    # what of its data a resumed run may change: data, tokenizer, document_mask, validation_share, packing, fim
    resume_changes: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the processes; auto: the GPU where there is one
    max_skipped_steps: int = 2  # consecutive steps that may be skipped for a loss or gradient that is not finite
    guard: GuardConfig = field(default_factory=GuardConfig)  # what follows on more of them, or on another problem
    distill: DistillConfig = field(default_factory=DistillConfig)  # a teacher whose distribution is learned
    grpo: GrpoConfig = field(default_factory=GrpoConfig)  # what `fp8moe grpo` samples, rewards and maximises
    # what backward computes again instead of keeping it from the forward (`fp8moe.layers.recompute`); the same bits
    recompute: tuple[Recompute, ...] = tuple(DEFAULT_RECOMPUTE)
    # record the third step of this attempt (the last of fewer) as run_dir/trace.json and end with its figures
    profile: bool = False
    report: bool = True  # write run_dir/report.html at the run's end, also where it ends early
    # a run that the formulas of `fp8moe plan` give more memory than there is doesn't start; false or off: it is tried
    plan: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            "",
            steps=POSITIVE,
            epochs=Range(above=0, most=10**6, use="use 2, or null for a number of steps"),
            seq_len=POSITIVE,
            seed=Range(least=0, most=2**63 - 1),
            max_skipped_steps=COUNT,
            init_perturbation=Range(least=0, below=1, use="use 0 for none"),
        )
        check_name(self.name)
        checkpoint.refuse_password("resume", self.resume)
        checkpoint.refuse_password("init_from", self.init_from)
        self.distill.check(self.parallel, self.model.vocab_size)
        once = ",".join(dict.fromkeys(self.recompute))
        if once != ",".join(self.recompute):
            raise ValueError(f"recompute=[{','.join(self.recompute)}] names one twice: use recompute=[{once}]")
        if unknown := [name for name in self.resume_changes if name not in CHANGES]:
            raise ValueError(f"resume_changes={unknown[0]} is nothing that may change: use {', '.join(CHANGES)}")
        if self.validation.ema and self.ema.decay is None:
            raise ValueError("validation.ema=true needs an average and ema.decay is null: use ema.decay=0.999")
        if self.init_from_ema and self.init_from is None:
            raise ValueError("init_from_ema=true and init_from is null: name the run, init_from=PATH")
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}: "
                f"use at most {self.model.max_seq_len}"
            )
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size={self.data.vocab_size} exceeds model.vocab_size={self.model.vocab_size}: "
                f"use at most {self.model.vocab_size}"
            )

    @property
    def recipe(self) -> Recipe:
        """Precision, recomputation and scales of the model, and whether keys are gathered."""
        gathered = self.parallel.cp > 1
        return Recipe(self.precision.mode, frozenset(self.recompute), self.precision.scales, gathered)

    @property
    def dp(self) -> int:
        """Data-parallel ranks of a resolved configuration."""
        return _resolved(self.parallel.dp)

    @property
    def ep(self) -> int:
        """Expert-parallel ranks of a resolved configuration."""
        return _resolved(self.parallel.ep)

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks, or groups that share sequences, that read sequences of their own."""
        return self.dp // self.parallel.cp

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch that a rank of a resolved configuration holds."""
        return self.micro_batch * self.seq_len // self.parallel.cp

    @property
    def micro_batch(self) -> int:
        """Sequences that a rank of a resolved configuration computes at once."""
        return _resolved(self.batch.micro_batch)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the full batch on each data-parallel rank of a resolved configuration."""
        return self.batch.sequences // (self.data_ranks * self.micro_batch)


def _resolved(value: int | None) -> int:
    assert value is not None, "resolve(config, world_size) comes first"
    return value


def stages_of(config: TrainConfig) -> tuple[Stage, ...]:
    """The stages that the model is cut into for the pipeline. Raises ConfigError where there are too few blocks."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = num_stages(parallel.schedule, parallel.pp)
    if layers < stages:
        most = layers * parallel.pp // stages
        most -= most % 2 if parallel.schedule == "dualpipe" else 0
        instead = f"parallel.pp={most}" if most else "parallel.schedule=1f1b"
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} with parallel.pp={parallel.pp} has {stages} stages, which need at "
            f"least 1 block each, and the model has {layers}: use {instead}"
        )
    return partition(
        config.model,
        stages,
        seq_len=config.seq_len,
        folded=parallel.schedule in FOLDED,
        layout=parallel.layout,
    )


def is_tied(config: TrainConfig) -> bool:
    """Whether the pipeline's last rank holds a copy of the embedding, for the MTP module, beside the first rank's."""
    return config.model.mtp_depth > 0 and config.parallel.pp > 1 and config.parallel.schedule not in FOLDED


def laid_out(config: TrainConfig, world_size: int, ranks_per_node: int) -> TrainConfig:
    """Check what depends on the number of processes alone; fill in dp, ep, the micro-batch and the ranks of a node.

    Reads nothing of this machine, so that any number of processes can be planned for anywhere. Raises ValueError or
    ConfigError.
    """
    check_unread(config)
    parallel, experts = config.parallel, config.model.experts.num_experts
    if parallel.dp is not None and parallel.pp * parallel.dp != world_size:
        raise ValueError(
            f"the mesh pp={parallel.pp} x dp={parallel.dp} needs {parallel.pp * parallel.dp} processes and there are "
            f"{world_size}: use parallel.dp={world_size // parallel.pp} or start {parallel.pp * parallel.dp}"
        )
    ep = parallel.ep
    validate_mesh(world_size, parallel.pp, 1 if ep is None else ep, experts, cp=parallel.cp)
    check_parts(config.seq_len, parallel.cp)
    least, multiple = microbatches(parallel.schedule, parallel.pp)
    stages_of(config)
    dp = world_size // parallel.pp
    batch = resolve_batch(config.batch, dp, cp=parallel.cp, least=least, multiple=multiple)
    if config.data.source == "problems":
        config.grpo.check_batch(batch.sequences, dp // parallel.cp * _resolved(batch.micro_batch) * multiple)
    if config.precision.mode is Precision.FP8:
        check_tokens(_resolved(batch.micro_batch), config.seq_len, parallel.cp)
    ep = math.gcd(dp // parallel.cp, experts) if ep is None else ep
    filled = dataclasses.replace(parallel, dp=dp, ep=ep)
    if parallel.dispatcher == "node_limited":
        per_node = parallel.ranks_per_node or ranks_per_node
        ranks_in_node(ep, per_node)
        filled = dataclasses.replace(filled, ranks_per_node=per_node)
    sharding, teacher = config.optimizer.sharding, config.distill.teacher
    check_captured(filled, sharding=sharding, data=config.data, teacher=teacher, profile=config.profile)
    return dataclasses.replace(config, parallel=filled, batch=batch)


def resolve(
    config: TrainConfig, world_size: int, foreign: checkpoint.OpenForeign = checkpoint.no_foreign
) -> TrainConfig:
    """Check what depends on the number of processes and on this machine; fill in dp, ep and the micro-batch.

    foreign: opens weights of `init_from` that are no checkpoint's. The kernels' back end is chosen here too, so that
    one that can't run is refused before anything starts. Raises ValueError or ConfigError. Starts and writes nothing.
    """
    config = laid_out(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))
    parallel = config.parallel
    config.validation.check(config.data_ranks, config.micro_batch, of=data_ranks_in_words(parallel.cp))
    if config.precision.backend is not None:
        set_backend(config.precision.backend)
    if config.optimizer.sharding == "deepspeed":
        check_deepspeed(
            pp=parallel.pp,
            dp=config.dp,
            background=config.checkpoint.background,
            averaged=config.ema.decay is not None,
        )
    check_trackers(config.logging)
    config = dataclasses.replace(config, checkpoint=config.checkpoint.resolved())
    check_run_dir(config.run_dir, config.resume)
    _check_resume(config, foreign)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda needs at least 1 CUDA device and torch sees 0: use device=cpu")
    if parallel.dispatcher == "deep_ep":
        check_deep_ep(config.precision.mode)
    return config


def foreign_weights(config: TrainConfig, foreign: checkpoint.OpenForeign) -> checkpoint.ForeignWeights | None:
    """The weights of `init_from` where they are no checkpoint's. Raises ConfigError where they are of another model."""
    weights = None if config.init_from is None else foreign(config.init_from, config.model)
    if weights is not None:
        weights.check(config.model)
        if config.init_from_ema:
            raise ConfigError(f"init_from={config.init_from} holds no average of weights: use init_from_ema=false")
    return weights


def _check_resume(config: TrainConfig, foreign: checkpoint.OpenForeign) -> None:
    path = config.checkpoint.path
    checkpoint.check_root(path, config.run_dir, config.resume)
    readable = checkpoint.readable_state(
        config.resume,
        config.run_dir,
        path,
        config.model,
        seed=config.seed,
        seq_len=config.seq_len,
        optimizer=config.optimizer.kind,
    )
    if readable is None:
        if config.init_from is not None and foreign_weights(config, foreign) is None:
            checkpoint.readable_weights(config.init_from, config.model, averaged=config.init_from_ema)
        return
    found, state = readable
    newest = checkpoint.find("auto", config.run_dir, path)
    by_name = checkpoint.is_complete(checkpoint.location(config.resume))  # no run, of which the newest is meant
    if (
        by_name
        and newest is not None
        and newest.parent.resolve() == found.parent.resolve()
        and newest.name != found.name
    ):
        raise ConfigError(
            f"resume={found.name} must be the newest checkpoint of its own run_dir, which is {newest.name}: use "
            "resume=auto to go on from that one, or a new run_dir"
        )
    if state.step >= config.steps:
        raise ConfigError(
            f"{found} has {state.step} steps done and steps={config.steps}: use steps={state.step + 1} or more to go on"
        )
