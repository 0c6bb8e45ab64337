"""One optimizer step, in the order of this file; what it did comes back as a `StepReport`.

    next_batches      this rank's micro-batches of the next global batch, and what the whole batch predicts
    forward_backward  the losses; gradients are added into `main_grad`
      train_passes      every micro-batch through this rank's stages, by the schedule
        run_pipeline      `parallel.pipeline` runs the schedule's actions; an action runs the phases of a stage's passes
                          (`model.stage`, `model.phases`)
    reduce            gradients and expert loads summed over the ranks that share them; the gradient norm
    update            the guard, the optimizer, which casts the weights as well, the router biases

The loss of a micro-batch is a sum over tokens divided by the token count of the whole global batch, which is counted
before the first backward; so gradients of micro-batches and ranks simply add up, and no average of averages is taken.
Loss and gradient norm are those of the global batch, the same number on every rank, and so is every decision.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.errors import NonFiniteError
from fp8moe.layers.linear import main_grad_of
from fp8moe.layers.recipe import Precision
from fp8moe.layers.router import update_bias, violations
from fp8moe.model.flops import mfu
from fp8moe.model.head_loss import ChunkLoss
from fp8moe.model.loss import LossCounts, LossTally, LossWeights, loss_weights
from fp8moe.model.stage import StagePasses
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.gradients import global_grad_norm, reduce_counts, reduce_gradients
from fp8moe.parallel.pipeline import PassObserver, Pipeline
from fp8moe.profile.spans import EXPOSED, PhaseLaps, Stopwatch, listening, marking, span
from fp8moe.schedule.action import Schedule
from fp8moe.schedule.build import build_schedule, forwards
from fp8moe.train.batch import global_batch, to_device
from fp8moe.train.build import tied_embedding
from fp8moe.train.cast_shares import cast_shares, casts_of
from fp8moe.train.finite_state import described, not_finite
from fp8moe.train.lr import Progress, bias_gamma, learning_rate, mtp_weight
from fp8moe.train.memory import memory_bytes
from fp8moe.train.method import StepWork
from fp8moe.train.metrics import StepReport, StepSeconds
from fp8moe.train.optimizer import DeepSpeedAdamW
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_point


@dataclass(frozen=True)
class Losses:
    """Losses of the global batch: nats a predicted token (the next one; the next but one), balance loss a sequence.

    wrong_biases: values of router biases, on all ranks, that were not finite. refused: ranks that know that the last
    checkpoint was refused.
    """

    main: float
    mtp: float
    balance: float
    wrong_biases: int = 0
    refused: int = 0


def train_step(run: Run, *, count_fp8: bool = False, next_work: Callable[[Run], StepWork] | None = None) -> StepReport:
    """Do step number `run.step + 1`. Collective over all ranks. `count_fp8` counts what the casts of this step lose.

    next_work: gives what the step works on, `next_batches` by cross entropy without one.
    """
    config, rates = run.config, run.config.optimizer.schedule
    started, stopwatch = time.perf_counter(), Stopwatch(run.device)
    at = Progress(run.step, config.steps, run.sampler.consumed * config.seq_len)
    lr, gamma = learning_rate(rates, at), bias_gamma(rates, config.model.router.bias_gamma, at)
    run.guard.check_rates(run.step + 1, lr, gamma)
    first_sample = run.sampler.consumed
    with span("data"):
        work = StepWork(*next_batches(run)) if next_work is None else next_work(run)
    counts = work.counts
    stopwatch.lap("data")

    run.model.main_grads.zero_()
    observing = count_fp8 and config.precision.mode is Precision.FP8
    if observing and run.zero is not None:
        run.zero.wait_weights()  # the casts of the weights belong to the update before
    with casts_of(run) if observing else contextlib.nullcontext() as casts:
        weight = mtp_weight(rates, config.model.mtp_weight, at) if work.mtp_weight is None else work.mtp_weight
        losses = forward_backward(run, work.batches, counts, weight, stopwatch, work.token_loss)
    with span("reduce"):
        grad_norm = reduce(run)

    run.dispatcher.verify()
    violation = worst_violation(run)
    accepted = end_step(run, losses, lr, gamma, grad_norm, stopwatch)

    laps, seconds = stopwatch.read(), time.perf_counter() - started
    saturated, underflow = cast_shares(run, casts)
    tokens_per_second = counts.main_tokens / seconds
    is_gpu = run.device.type == "cuda"
    return StepReport(
        step=run.step,
        loss=losses.main,
        mtp_loss=losses.mtp if config.model.mtp_depth else None,
        aux_loss=losses.balance if config.model.has_experts else None,
        grad_norm=grad_norm,
        lr=lr,
        skipped=not accepted,
        tokens=counts.main_tokens,
        consumed_samples=run.sampler.consumed,
        tokens_per_second=tokens_per_second,
        mfu=mfu(config.model, config.seq_len, tokens_per_second / run.mesh.world_size) if is_gpu else None,
        max_violation=violation,
        fp8_saturated_share=saturated.of_step,
        fp8_underflow_share=underflow.of_step,
        seconds=seconds,
        time=StepSeconds(laps["data"], laps["forward"], laps["backward"], laps[EXPOSED], laps["optimizer"]),
        memory_bytes=memory_bytes(run.device),
        skipped_samples=None if accepted else (first_sample, run.sampler.consumed - 1),
        fp8_saturated_by_kind=saturated.by_kind,
        fp8_underflow_by_kind=underflow.by_kind,
    )


def next_batches(run: Run) -> tuple[list[Batch], LossCounts]:
    """This rank's micro-batches of the next global batch, and what the whole of it predicts. Collective over dp."""
    config, mesh = run.config, run.mesh
    first = run.sampler.consumed
    sequences = len(run.sampler.next_indices(global_batch(config.batch, first)))
    read = run.reader.take(first)
    main_tokens, mtp_tokens = all_reduce(read.predicted, mesh.dp_group).tolist()
    return read.batches, LossCounts(main_tokens, mtp_tokens, sequences)


def forward_backward(
    run: Run,
    batches: list[Batch],
    counts: LossCounts,
    mtp_weight: float,
    stopwatch: Stopwatch,
    token_loss: ChunkLoss | None = None,
) -> Losses:
    """Add the gradients of every micro-batch into `main_grad`, and give the losses of the global batch.

    Collective over all ranks.
    """
    weights = loss_weights(counts, mtp_weight=mtp_weight, balance_alpha=run.config.model.router.aux_loss_alpha)
    sums = train_passes(run, batches, weights, stopwatch, token_loss)
    wrong = torch.stack(
        [(~router.bias_E.isfinite()).sum() for router in run.routers().values()] or [sums.new_zeros(())]
    )
    refused = sums.new_full((1,), float(run.saver.is_refused))
    main, mtp, balance, biases, refusals = all_reduce(
        torch.cat([sums, wrong.sum(0, True).double(), refused]), run.mesh.world_group
    ).tolist()
    return Losses(
        main / max(counts.main_tokens, 1),
        mtp / max(counts.mtp_tokens, 1),
        balance / max(counts.sequences, 1),
        int(biases),
        int(refusals),
    )


def train_passes(
    run: Run,
    batches: Sequence[Batch],
    weights: LossWeights,
    stopwatch: Stopwatch,
    token_loss: ChunkLoss | None = None,
) -> Tensor:
    """Forward and backward of this rank's part of every micro-batch; gradients are added into `main_grad`.

    token_loss: the main loss in place of cross entropy.
    -> FP64 [3], this rank's share of the main, MTP and balance losses' sums. Collective over pipeline and experts.
    """
    schedule = training_schedule(run, len(batches))
    if run.zero is not None:
        run.zero.begin(schedule)
    with listening(PhaseLaps(stopwatch)), marking(run.device):
        if run.captured is not None and run.captured.takes(token_loss):
            return run.captured.run(partial(_run_actions, run, training_schedule(run, 1)), batches, weights)
        return run_pipeline(run, schedule, batches, weights, token_loss)


def forward_passes(run: Run, batches: Sequence[Batch], token_loss: ChunkLoss | None = None) -> Tensor:
    """Forwards alone, for validation: the model in evaluation mode -> FP64 [3] as above. Collective likewise."""
    schedule = forwards(training_schedule(run, run.config.num_microbatches), len(batches))
    if run.zero is not None:
        run.zero.wait_weights()  # a pass waits by its place, and without the MTP module the loss has another
    run.model.eval()
    try:
        with torch.no_grad():
            return run_pipeline(run, schedule, batches, LossWeights(0.0, 0.0, 0.0), token_loss)
    finally:
        run.model.train()


def run_pipeline(
    run: Run, schedule: Schedule, batches: Sequence[Batch], weights: LossWeights, token_loss: ChunkLoss | None = None
) -> Tensor:  # fmt: skip
    """Run this rank's actions of `schedule` -> FP64 [3], its share of the losses' sums."""
    tally = LossTally(run.device)
    on_device = [to_device(batch, run.device) for batch in batches]
    _run_actions(run, schedule, on_device, weights, tally, token_loss, run.zero)
    return tally.sums


def _run_actions(
    run: Run, schedule: Schedule, batches: Sequence[Batch], weights: LossWeights, tally: LossTally,
    token_loss: ChunkLoss | None = None, observer: PassObserver | None = None,
) -> None:  # fmt: skip
    config, dtype = run.config, run.config.precision.mode.dtype
    Pipeline(
        schedule,
        run.mesh.pp_rank,
        run.links,
        StagePasses(run.model, run.stages, batches, weights, tally, token_loss),
        empty=partial(torch.empty, config.rank_tokens, config.model.dim, dtype=dtype, device=run.device),
        overlap=config.parallel.overlap,
        sms=sms_for_gemms(run),
        observer=observer,
    ).run()


def training_schedule(run: Run, num_microbatches: int) -> Schedule:
    """The pipeline's schedule of a training step with so many micro-batches a data-parallel rank."""
    return _schedule(run.config.parallel.schedule, run.config.parallel.pp, num_microbatches)


_schedule = lru_cache(build_schedule)  # a batch that grows comes with a few sizes


def sms_for_gemms(run: Run) -> int | None:
    """The GPU's SMs less those of the layers' messages; None on a CPU, and without such messages."""
    if run.device.type != "cuda" or run.mesh.ep * run.mesh.cp == 1:
        return None
    count: int = torch.cuda.get_device_properties(run.device).multi_processor_count
    return max(1, count - run.config.parallel.communication_sms)


def reduce(run: Run) -> float:
    """Sum gradients and loads over the ranks that share them, and give the norm of all gradients. Collective.

    The norm is read on the host here, because the guard decides by it; the update itself waits for nothing.
    """
    main_grads, mesh = run.model.main_grads, run.mesh
    if isinstance(run.optimizer, DeepSpeedAdamW):
        reduce_counts(run.model, mesh)
        return run.optimizer.reduce()
    if run.zero is not None:
        squares = run.zero.finish()
        reduce_counts(run.model, mesh)
        return float(all_reduce(squares, mesh.world_group).sqrt())
    tied = None if mesh.tie_group is None else main_grad_of(tied_embedding(run.model))
    reduce_gradients(main_grads, mesh, tied)
    reduce_counts(run.model, mesh)
    return global_grad_norm(main_grads, mesh, copy=tied if mesh.pp_rank > 0 else None)


def end_step(run: Run, losses: Losses, lr: float, gamma: float, grad_norm: float, stopwatch: Stopwatch) -> bool:
    """Ask the guard, update, and count the step -> whether it was accepted. Collective over all ranks."""
    wrong = worst_bias(run) if losses.wrong_biases else None
    accepted = run.guard.accepts(run.step + 1, losses.main + losses.mtp + losses.balance, grad_norm, wrong)
    with run.preemption.changing():
        if losses.refused:
            note_refusal(run)
        update(run, lr, gamma, grad_norm, accepted=accepted)
        stopwatch.lap("optimizer")
        run.step += 1
        if run.reference is not None:
            run.reference.replace_if_due(run.step, run.sampler.consumed)
        run.point = save_point(run)
    return accepted


def update(run: Run, lr: float, gamma: float, grad_norm: float, *, accepted: bool) -> None:
    """Update weights, FP8 blocks, their average, router biases and the run's loads; only if the step was accepted.

    Either way the routers' counts of this step are forgotten.
    """
    run.saver.wait_copied()
    if run.ema is not None:
        run.ema.wait_copied()
    if accepted:
        for name, router in run.routers().items():
            run.loads[name] += router.counts_E
        with span("optimizer"):
            run.optimizer.step(lr, grad_norm)
        if run.ema is not None and run.config.ema.is_due(run.optimizer.updates):
            run.ema.start_update()
    update_bias(run.model, gamma if accepted else 0.0)


def note_refusal(run: Run) -> None:
    """Note that the last checkpoint was refused, which is owed then. Waits for the saver's thread, on every rank."""
    try:
        run.saver.wait()
    except NonFiniteError as error:
        run.guard.problem, run.save_is_due = str(error), True


def worst_bias(run: Run) -> str | None:
    """A clause on a router's bias that is not finite, and its ranks. Collective over all ranks."""
    biases = {f"bias.{name}": [router.bias_E] for name, router in run.routers().items()}
    return described(gather(not_finite(biases), run.mesh.world_group))


def worst_violation(run: Run) -> float | None:
    """The worst layer's MaxVio in the step's loads, of all stages; None without experts. Collective over pp."""
    if not run.config.model.has_experts:
        return None
    counts = [router.counts_E for router in run.routers().values()]
    mine = violations(torch.stack(counts)).max() if counts else torch.zeros((), device=run.device)
    return float(all_reduce(mine.double(), run.mesh.pp_group, dist.ReduceOp.MAX))
