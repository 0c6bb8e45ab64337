"""The training run, from a resolved configuration to its summary. The loop itself is a paragraph.

Every rank runs this. What only rank 0 does, and what a single process leaves out, is decided in the parts, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig
from fp8moe.train.ema import Ema
from fp8moe.train.garbage import collect_if_due, no_collection_within_steps
from fp8moe.train.memory import out_of_memory_in_words
from fp8moe.train.metrics import StepReport
from fp8moe.train.optimizer import Optimizer
from fp8moe.train.processes import choose_device, claim_run_dir, end_startup, processes
from fp8moe.train.run import Run
from fp8moe.train.run_dir import describe_start
from fp8moe.train.run_log import RunLogger, log_file
from fp8moe.train.run_state import start_checkpoint
from fp8moe.train.step import forward_passes, train_step
from fp8moe.train.step_trace import StepTrace
from fp8moe.train.summary import Summary
from fp8moe.train.validation import ValidationReport, validate

logger = logging.getLogger(__name__)


def train(config: TrainConfig, as_yaml: Callable[[TrainConfig], str]) -> Summary:
    """Run a resolved `config` to its end. Collective over all ranks; `as_yaml` gives config.yaml's text."""
    started = time.perf_counter()
    device = choose_device(config)
    with processes(config, device) as mesh:
        run_dir = claim_run_dir(config, mesh)
        with log_file(run_dir, mesh.rank):
            try:
                run = build(config, mesh, device, run_dir)
                if run.is_first:
                    tokenizer = run.data.tokenizer
                    describe_start(run_dir, run.step, as_yaml(config), None if tokenizer is None else tokenizer.path)
                with out_of_memory_in_words(run), no_collection_within_steps():
                    return run_to_end(run, started)
            except Exception:
                logger.exception("rank %d ends here", mesh.rank)
                raise


def run_to_end(run: Run, started: float) -> Summary:
    """Train the steps that are left; `started` is the perf_counter reading that `wall_seconds` counts from."""
    config, run_logger, trace = run.config, RunLogger(run, started), StepTrace(run)
    try:
        while run.step < config.steps:
            with trace.around(run):
                report = train_step(run, count_fp8=config.logging.fp8_is_due(run.step + 1, config.steps))
            if run_logger.num_steps == 0:
                end_startup(run.mesh, run.links, config.parallel.timeout)
            validations = _validations(run)
            run_logger.note(_save(run, report), *validations)
            collect_if_due(run.step)
            run_logger.note_saved(run.saver.finished(), run.saver.failures())
        run.saver.close()
        if run.ema is not None:
            run.ema.wait()
        run_logger.note_saved(run.saver.finished(), run.saver.failures())
        return run_logger.finish(trace.figures)
    finally:
        run_logger.close()


def _validations(run: Run) -> tuple[ValidationReport | None, ValidationReport | None]:
    """The validation loss where one is due, and that of the average of the weights where it is asked for."""
    if not run.config.validation.is_due(run.step, run.config.steps):
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
    with run.optimizer.reading(list(ema.tensors().values())):
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
    return report


def _save(run: Run, report: StepReport) -> StepReport:
    """Begin a checkpoint where one is due -> the report with the seconds that training waited for it."""
    if not run.config.checkpoint.is_due(run.step, run.config.steps):
        return report
    start = time.perf_counter()
    start_checkpoint(run)
    spent = dataclasses.replace(report.time, checkpoint=time.perf_counter() - start)
    return dataclasses.replace(report, time=spent)
