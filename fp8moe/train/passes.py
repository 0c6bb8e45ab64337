"""Where a step's micro-batches meet the model: the pipeline that runs them, for training and for validation.

One way for every layout: a run without a pipeline is a pipeline of one rank. `Transformer.forward` computes the same,
bit by bit, under ordinary autograd, and is what the tests hold this against.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.stage import StageRuns
from fp8moe.parallel.action import Schedule
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.parallel.schedule import build_schedule, forwards
from fp8moe.parallel.trace import listening
from fp8moe.train.batch import to_device
from fp8moe.train.build import Run
from fp8moe.train.stopwatch import PhaseLaps, Stopwatch


def train_passes(run: Run, batches: Sequence[Batch], weights: LossWeights, watch: Stopwatch) -> Tensor:
    """Forward and backward of this rank's part of every micro-batch; gradients are added into `main_grad`.

    -> FP64 [3], this rank's share of the main, MTP and balance losses' sums. Collective over pipeline and experts.
    """
    parallel = run.config.parallel
    with listening(PhaseLaps(watch)):
        return _run(run, _training(parallel.schedule, parallel.pp, len(batches)), batches, weights)


def forward_passes(run: Run, batches: Sequence[Batch]) -> Tensor:
    """Forwards alone, the model in evaluation mode -> FP64 [3] as above. Collective likewise."""
    parallel = run.config.parallel
    training = _training(parallel.schedule, parallel.pp, run.config.num_microbatches)
    run.model.eval()
    try:
        with torch.no_grad():
            return _run(run, forwards(training, len(batches)), batches, LossWeights(0.0, 0.0, 0.0))
    finally:
        run.model.train()


@lru_cache
def _training(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return build_schedule(name, num_ranks, num_microbatches)


def _run(run: Run, schedule: Schedule, batches: Sequence[Batch], weights: LossWeights) -> Tensor:
    config, tally = run.config, LossTally(run.device)
    on_device = [to_device(batch, run.device) for batch in batches]
    tokens = config.micro_batch * config.seq_len
    Pipeline(
        schedule,
        run.mesh.pp_rank,
        run.links,
        StageRuns(run.model, run.stages, on_device, weights, tally),
        empty=partial(torch.empty, tokens, config.model.dim, dtype=config.precision.mode.dtype, device=run.device),
        overlap=config.parallel.overlap,
        sms=sms_for_gemms(run),
    ).run()
    return tally.sums


def sms_for_gemms(run: Run) -> int | None:
    """What the experts' messages leave of the GPU's SMs; None on a CPU, and without such messages."""
    if run.device.type != "cuda" or run.mesh.ep == 1:
        return None
    count: int = torch.cuda.get_device_properties(run.device).multi_processor_count
    return max(1, count - run.config.parallel.communication_sms)
