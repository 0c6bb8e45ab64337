"""The whole of a run's configuration: one frozen dataclass a concern, each beside its consumer, composed here.

What can be known before a process group exists is checked here, in `settle`, so that a mistake costs one sentence and
not the start of a thousand processes. `settle` also fills in what depends on how many processes there are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from fp8moe.data.sources import DataConfig
from fp8moe.errors import ConfigError
from fp8moe.kernels.backend import set_backend
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recompute
from fp8moe.model.config import FP8_MULTIPLE, ModelConfig
from fp8moe.model.partition import Stage, partition
from fp8moe.parallel.deep_ep import check_deep_ep
from fp8moe.parallel.mesh import ranks_in_node, validate_mesh
from fp8moe.parallel.schedule import FOLDED, microbatches, num_stages
from fp8moe.train import checkpoint
from fp8moe.train.batch import BatchConfig, settle_batch
from fp8moe.train.checkpoint import CheckpointConfig
from fp8moe.train.metrics import LoggingConfig, check_wandb
from fp8moe.train.optimizer import OptimizerConfig
from fp8moe.train.run_dir import check_run_dir
from fp8moe.train.validation import ValidationConfig


@dataclass(frozen=True)
class PrecisionConfig:
    """mode: fp32, bf16 or fp8 (see `fp8moe.layers.precision`).

    backend: of the kernels (`fp8moe.kernels.backend`); None leaves it to FP8MOE_BACKEND and the device.
    """

    mode: Precision
    backend: str | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """World = pp x dp, ep inside dp. dp: None is processes / pp; ep: None is the most ranks that experts spread over.

    schedule: of the pipeline's pp ranks (`fp8moe.parallel.schedule`); dualpipev has a use at pp=1 too, it hides the
    experts' messages of one micro-batch under the compute of another. overlap: whether messages are hidden under
    compute (False: one after the other, the same bits). communication_sms: on a GPU, the SMs that messages of experts
    may take (NCCL's max_ctas), and that GEMMs of an overlapped pair leave to them.
    layout: blocks of each pipeline stage, given by hand; None cuts the model by cost (`fp8moe.model.partition`).
    dispatcher: how tokens travel (`fp8moe.parallel`): all_to_all in one hop; node_limited once to each node of
    ranks_per_node (None: the processes of this machine), then inside it; deep_ep where that package is installed.
    chunks: messages a dispatch. capacity_factor: messages of a fixed size, this multiple of an even share, with no wait
    for counts; an overflow is an error before the step (None: exact counts). max_imbalance: rows a rank may receive, as
    a multiple of an even share, before anything is allocated for them (None: whatever comes).
    timeout, startup_timeout: seconds a rank waits for a message, afterwards and until the first step is done (the first
    step compiles kernels and opens connections).
    """

    pp: int = 1
    dp: int | None = None
    ep: int | None = None
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    overlap: bool = True
    communication_sms: int = 20
    layout: tuple[int, ...] | None = None
    dispatcher: Literal["all_to_all", "node_limited", "deep_ep"] = "all_to_all"
    ranks_per_node: int | None = None
    chunks: int = 1
    capacity_factor: float | None = None
    max_imbalance: float | None = None
    timeout: float = 300.0
    startup_timeout: float = 900.0

    def __post_init__(self) -> None:
        for name in ("timeout", "startup_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"parallel.{name}={getattr(self, name)} seconds must be above 0")
        for name in ("communication_sms", "chunks", "ranks_per_node", "capacity_factor", "max_imbalance"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name}={value} must be at least 1")
        if self.capacity_factor is not None and self.max_imbalance is not None:
            raise ValueError(
                f"parallel.capacity_factor={self.capacity_factor} bounds what a rank receives already: "
                f"use parallel.max_imbalance=null, not {self.max_imbalance}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A run. steps: optimizer steps in all; seq_len: tokens a sequence predicts; seed: of weights and data order.

    resume: "none", "auto" (the newest complete checkpoint of run_dir, if any) or a checkpoint's or run's path.
    max_skipped_steps: steps in a row that may be skipped for a loss or gradient that is not finite.
    recompute: what a forward leaves to the backward to compute again (`fp8moe.layers.recompute`); bits don't change.
    profile: record the third step of this attempt (the last of fewer) as run_dir/trace.json, with figures in the end.
    """

    model: ModelConfig
    data: DataConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    logging: LoggingConfig
    batch: BatchConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    name: str
    steps: int
    seq_len: int
    seed: int = 0
    run_dir: str | None = None
    resume: str = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_skipped_steps: int = 3
    recompute: tuple[Recompute, ...] = tuple(DEFAULT)
    profile: bool = False

    def __post_init__(self) -> None:
        once = ",".join(dict.fromkeys(self.recompute))
        if once != ",".join(self.recompute):
            raise ValueError(f"recompute=[{','.join(self.recompute)}] says a name twice: use recompute=[{once}]")
        for name in ("steps", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_skipped_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
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
    def dp(self) -> int:
        """Data-parallel ranks of a settled configuration."""
        assert self.parallel.dp is not None, "settle(config, world_size) comes first"
        return self.parallel.dp

    @property
    def ep(self) -> int:
        """Expert-parallel ranks of a settled configuration."""
        assert self.parallel.ep is not None, "settle(config, world_size) comes first"
        return self.parallel.ep

    @property
    def micro_batch(self) -> int:
        """Sequences a rank of a settled configuration computes at once."""
        assert self.batch.micro_batch is not None, "settle(config, world_size) comes first"
        return self.batch.micro_batch

    @property
    def num_microbatches(self) -> int:
        """Micro-batches a step of the full batch, on each data-parallel rank, of a settled configuration."""
        return self.batch.sequences // (self.dp * self.micro_batch)


def stages_of(config: TrainConfig) -> tuple[Stage, ...]:
    """How the model is cut for the pipeline. Raises ConfigError where it can't be."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = num_stages(parallel.schedule, parallel.pp)
    if layers < stages:
        most = layers * parallel.pp // stages
        most -= most % 2 if parallel.schedule == "dualpipe" else 0
        instead = f"parallel.pp={most}" if most else "parallel.schedule=1f1b"
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} on parallel.pp={parallel.pp} has {stages} stages of at least 1 "
            f"block and the model has {layers}: use {instead}"
        )
    return partition(
        config.model,
        stages,
        seq_len=config.seq_len,
        folded=parallel.schedule in FOLDED,
        layout=parallel.layout,
    )


def _check_tokens(micro_batch: int, seq_len: int) -> None:
    """FP8 casts the tokens of a micro-batch along both axes, so their number is one of its sizes."""
    tokens = micro_batch * seq_len
    if tokens % FP8_MULTIPLE:
        nearest = max(FP8_MULTIPLE, round(seq_len / FP8_MULTIPLE) * FP8_MULTIPLE)
        raise ValueError(
            f"batch.micro_batch x seq_len = {micro_batch} x {seq_len} = {tokens} tokens is no multiple of "
            f"{FP8_MULTIPLE}, as FP8 needs: use seq_len={nearest}"
        )


def settle(config: TrainConfig, world_size: int) -> TrainConfig:
    """Check what depends on the number of processes and on this machine; fill in dp, ep and the micro-batch.

    The kernels' back end is chosen here too, so that one that can't run is refused with all else. Raises ValueError or
    ConfigError. Starts nothing and writes nothing.
    """
    parallel = config.parallel
    experts = config.model.num_experts
    if parallel.dp is not None and parallel.pp * parallel.dp != world_size:
        raise ValueError(
            f"the mesh pp={parallel.pp} x dp={parallel.dp} needs {parallel.pp * parallel.dp} processes and there are "
            f"{world_size}: use parallel.dp={world_size // parallel.pp} or start {parallel.pp * parallel.dp}"
        )
    ep = parallel.ep
    validate_mesh(world_size, parallel.pp, 1 if ep is None else ep, experts)
    least, multiple = microbatches(parallel.schedule, parallel.pp)
    stages_of(config)
    dp = world_size // parallel.pp
    batch = settle_batch(config.batch, dp, least=least, multiple=multiple)
    assert batch.micro_batch is not None
    config.validation.check(dp, batch.micro_batch)
    if config.precision.mode is Precision.FP8:
        _check_tokens(batch.micro_batch, config.seq_len)
    if config.precision.backend is not None:
        set_backend(config.precision.backend)
    check_wandb(config.logging)
    check_run_dir(config.run_dir, config.resume)
    _check_resume(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda needs at least 1 CUDA device and torch sees 0: use device=cpu")
    ep = math.gcd(dp, experts) if ep is None else ep
    filled = dataclasses.replace(parallel, dp=dp, ep=ep)
    if parallel.dispatcher == "node_limited":
        per_node = parallel.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
        ranks_in_node(ep, per_node)
        filled = dataclasses.replace(filled, ranks_per_node=per_node)
    if parallel.dispatcher == "deep_ep":
        check_deep_ep(config.precision.mode)
    return dataclasses.replace(config, parallel=filled, batch=batch)


def _check_resume(config: TrainConfig) -> None:
    found = checkpoint.find(config.resume, config.run_dir)
    if found is None:
        return
    newest = checkpoint.find("auto", config.run_dir)
    if newest is not None and newest.parent.resolve() == found.parent.resolve() and newest.name != found.name:
        raise ConfigError(
            f"resume={found.name} would branch off before {newest.name} of this run: use resume=auto or a new run_dir"
        )
    state = checkpoint.read_state(found, config.model, seed=config.seed, seq_len=config.seq_len)
    if state.step >= config.steps:
        raise ConfigError(f"{found} is after step {state.step} of steps={config.steps}: use more steps to go on")
