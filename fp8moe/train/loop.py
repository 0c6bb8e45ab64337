"""The training run, from a resolved configuration to its summary. The loop itself is a paragraph.

Every rank runs this. What only rank 0 does, and what a single process leaves out, is decided in the parts, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fp8moe.errors import NonFiniteError
from fp8moe.parallel.place import rank_in_words
from fp8moe.train import checkpoint
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig
from fp8moe.train.consistency import check_consistency
from fp8moe.train.detail import Detail
from fp8moe.train.ema import Ema
from fp8moe.train.garbage import collect_if_due, no_collection_within_steps
from fp8moe.train.method import Method
from fp8moe.train.optimizer import Optimizer
from fp8moe.train.out_of_memory import out_of_memory_in_words
from fp8moe.train.preempt import Preemption
from fp8moe.train.processes import choose_device, claim_run_dir, end_startup, processes, release_run_dir
from fp8moe.train.rollback import last_step_skipped, roll_back
from fp8moe.train.run import Run
from fp8moe.train.run_dir import describe_start
from fp8moe.train.run_lock import released
from fp8moe.train.run_log import RunLogger, log_file
from fp8moe.train.run_state import save_and_stop, save_point, start_checkpoint
from fp8moe.train.step import forward_passes, train_step
from fp8moe.train.step_trace import StepTrace
from fp8moe.train.stragglers import Stragglers
from fp8moe.train.summary import Summary
from fp8moe.train.validation import ValidationReport, validate

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    as_yaml: Callable[[TrainConfig], str],
    foreign: checkpoint.OpenForeign = checkpoint.no_foreign,
    last_lines: Callable[[Run], str] | None = None,
    report: Callable[[Path], None] | None = None,
    method: Method | None = None,
) -> Summary:
    """Run a resolved `config` to its end. Collective over all ranks.

    as_yaml: gives config.yaml's text. foreign: opens weights of `init_from` that are no checkpoint's. last_lines, which
    is collective too: what is printed behind the summary. report: called on rank 0 with the run directory however the
    run ends, unless report=false; it must not raise. method: what the steps work on; pretraining without one.
    """
    started = time.perf_counter()
    device, preemption = choose_device(config), Preemption()
    with preemption.watching(), processes(config, device) as mesh:
        preemption.join(mesh)
        run_dir = claim_run_dir(config, mesh)
        preemption.on_end.append(partial(release_run_dir, run_dir, mesh))
        with released(run_dir), log_file(run_dir, mesh.rank), contextlib.ExitStack() as at_end:
            try:
                run = build(config, mesh, device, run_dir, foreign, None if method is None else method.open_data)
                run.preemption = preemption
                if report is not None and config.report and run.is_first:  # a run that is refused changes no file
                    at_end.callback(report, run_dir)
                    preemption.on_end.append(lambda _: report(run_dir))
                if run.is_first:
                    tokenizer, chat = run.data.tokenizer, run.data.chat
                    path = None if tokenizer is None else tokenizer.path
                    describe_start(run_dir, run.step, as_yaml(config), path, None if chat is None else chat.files())
                with out_of_memory_in_words(run), no_collection_within_steps():
                    if method is not None:
                        method.begin(run)
                    return run_to_end(run, started, last_lines, method)
            except Exception:
                logger.exception("%s ends here", rank_in_words(mesh.rank))
                raise


def run_to_end(
    run: Run, started: float, last_lines: Callable[[Run], str] | None = None, method: Method | None = None
) -> Summary:
    """Train the steps that are left; `started` is the perf_counter reading that `wall_seconds` counts from."""
    config, run_logger, trace = run.config, RunLogger(run, started), StepTrace(run)
    stragglers, detail = Stragglers(run.mesh), Detail(run)
    run.point, preemption, waited = save_point(run), run.preemption, 0.0
    preemption.saves(partial(_step_of, run), partial(_stop, run, run_logger, run.step))
    try:
        while run.step < config.steps:
            preemption.stop_here()
            with trace.around(run):
                report = train_step(
                    run,
                    count_fp8=config.logging.fp8_is_due(run.step + 1, config.steps),
                    next_work=None if method is None else method.work,
                )
            if method is not None:
                run_logger.add_figures(method.figures(run))
            report = dataclasses.replace(report, time=dataclasses.replace(report.time, checkpoint=waited))
            run_logger.expect(report)
            if run_logger.num_steps == 0:
                end_startup(run.mesh, run.links, config.parallel.timeout)
            if (slowest := stragglers.note(report)) is not None:
                run_logger.note_slowest(slowest)
            detail.note(report)
            if run.guard.problem is None and config.guard.consistency_is_due(run.step):
                check_consistency(run)
            if method is not None and run.guard.problem is None and config.validation.is_due(run.step, config.steps):
                run_logger.add_figures(method.score(run))
            run_logger.note(report, *_validations(run))
            waited = _save(run)
            collect_if_due(run.step)
            run_logger.note_saved(run.saver.finished(), run.saver.failures())
            if run.guard.problem is not None:
                with preemption.changing():
                    run_logger.note_rollback(roll_back(run))
                    detail.forget()
                    run.point = save_point(run)
        with preemption.changing():
            run.saver.close()
            if run.ema is not None:
                run.ema.wait()
            run_logger.note_saved(run.saver.finished(), run.saver.failures())
            if run.guard.in_a_row:
                raise last_step_skipped(run)
            preemption.finish()
            summary = run_logger.finish(trace.figures)
        if last_lines is not None:
            run_logger.print(last_lines(run))
        return summary
    except Exception as error:
        run_logger.note_event("failure", str(error))
        raise
    finally:
        run.reader.close()
        run_logger.close()


def _step_of(run: Run) -> int:
    assert run.point is not None
    return run.point.state.step


def _stop(run: Run, run_logger: RunLogger, first: int) -> str:
    """Save a preempted run as it was at the end of its last step, whose line is written before."""
    run_logger.write_expected(_step_of(run))
    done = save_and_stop(run, first)
    run_logger.note_event("preempted", done, at=_step_of(run))
    return done


def _validations(run: Run) -> tuple[ValidationReport | None, ValidationReport | None]:
    """The validation loss where one is due, and that of the average of the weights where it is asked for."""
    if run.guard.problem is not None or not run.config.validation.is_due(run.step, run.config.steps):
        return None, None
    report = _validate(run)
    if run.ema is None or not run.config.validation.ema:
        return report, None
    with averaged_weights(run, run.ema):
        return report, _validate(run)


@contextlib.contextmanager
def averaged_weights(run: Run, ema: Ema) -> Iterator[None]:
    """While the block runs the model's weights are their average; afterwards the same bits as before.

    Router biases have no average and stay.
    """
    assert isinstance(run.optimizer, Optimizer), "DeepSpeed's masters are not averaged"
    with run.preemption.changing(), run.optimizer.reading(list(ema.tensors().values())):
        yield


def _validate(run: Run) -> ValidationReport:
    report = validate(
        lambda batches: forward_passes(run, batches)[0],
        run.data.validation,
        run.data.token_bytes,
        run.mesh,
        samples=run.config.validation.samples,
        micro_batch=run.config.micro_batch,
    )
    run.dispatcher.verify()
    if not math.isfinite(report.loss):
        run.guard.problem = f"the validation loss after step {run.step} is {report.loss}"
    return report


def _save(run: Run) -> float:
    """Begin a checkpoint where one is due -> seconds that training waited for it.

    None is written behind a step that was skipped, or of a state that is not finite: it is owed. After the last step
    the checkpoint is waited for, since what is wrong with its state is a problem like any.
    """
    guard, is_last = run.guard, run.step == run.config.steps
    run.save_is_due |= run.config.checkpoint.is_due(run.step, run.config.steps)
    is_due = run.save_is_due and not guard.in_a_row
    if guard.problem is not None or not (is_due or is_last):
        return 0.0
    start = time.perf_counter()
    with run.preemption.changing():
        try:
            if is_due:
                start_checkpoint(run)
            if is_last:
                run.saver.wait()
        except NonFiniteError as error:
            guard.problem, run.save_is_due = str(error), True
            return 0.0
    run.save_is_due &= not is_due
    return time.perf_counter() - start
