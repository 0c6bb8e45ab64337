"""Learning from a teacher's distribution, as a method of training (`train.method`): other losses on the same batches.

    work        the next micro-batches, as without a teacher; the teacher's forward on each, its top k kept
    the step    unchanged, with `TeacherLoss` for cross entropy; the MTP module keeps its own

The teacher is a model of its own: another size, its own precision, its own kind of attention. It is whole on every
rank but for its experts, which lie over the run's ep ranks as the student's do. Its forwards come before those of the
step, so its activations are gone when the student's begin and its messages never mix with theirs. Refused: the forward
where the loss asks for it, inside the pipeline, which keeps one micro-batch's top k instead of all, a few MB each.

Nothing of the teacher is in a checkpoint: a run that goes on opens it again by its name, which config.yaml holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8moe.data.build import Data
from fp8moe.data.identity import content_hash
from fp8moe.data.tokenizer import load_tokenizer
from fp8moe.errors import ConfigError
from fp8moe.generate.open import load_model
from fp8moe.layers.recipe import Precision
from fp8moe.model.flops import count_parameters
from fp8moe.parallel.mesh import Mesh, divisors, listed
from fp8moe.post.distill.teacher_kl import TeacherLoss
from fp8moe.post.distill.teacher_topk import teacher_topk
from fp8moe.profile.spans import span
from fp8moe.train import checkpoint
from fp8moe.train.batch import check_tokens
from fp8moe.train.build import open_files
from fp8moe.train.config import TrainConfig
from fp8moe.train.method import StepWork
from fp8moe.train.run import Run
from fp8moe.train.step import next_batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that was found and not loaded: its own configuration, its name or opened weights, its tokenizer."""

    config: TrainConfig
    weights: str | checkpoint.ForeignWeights
    tokenizer: Path | None

    def check(self, student: TrainConfig) -> None:
        """Raises ConfigError or ValueError unless a resolved `student` can learn from it."""
        ours, theirs, name = student.model, self.config.model, f"distill.teacher={student.distill.teacher}"
        if theirs.vocab_size != ours.vocab_size:
            raise ConfigError(
                f"{name} has a vocabulary of {theirs.vocab_size} and model.vocab_size={ours.vocab_size}: use a teacher "
                "of the same, or teach by text, fp8moe distill generate"
            )
        if theirs.max_seq_len < student.seq_len:
            raise ConfigError(
                f"{name} has a context of {theirs.max_seq_len} tokens and seq_len={student.seq_len}: use "
                f"seq_len={theirs.max_seq_len}"
            )
        experts = theirs.experts.num_experts
        if experts % student.ep:
            legal = listed([ep for ep in divisors(student.ep) if experts % ep == 0])
            raise ConfigError(
                f"parallel.ep={student.ep} does not divide the {experts} experts of {name}: use parallel.ep={legal}"
            )
        if self.config.precision.mode is Precision.FP8:
            try:
                check_tokens(student.micro_batch, student.seq_len, 1)
            except ValueError as error:
                raise ConfigError(f"{name} computes in FP8, and {error}") from error

    def check_tokenizer(self, tokenizer: Path | None, name: str) -> None:
        """Raises ConfigError or DataError unless both tokenizers give every id the same text."""
        if tokenizer is None or self.tokenizer is None:
            whose = "its data" if tokenizer is None else name
            logger.warning("%s has no tokenizer: that both models mean the same by an id is not checked", whose)
            return
        if content_hash(tokenizer) == content_hash(self.tokenizer):
            return
        ours, theirs = (load_tokenizer(path).get_vocab() for path in (tokenizer, self.tokenizer))
        if ours != theirs:
            common = len(ours.items() & theirs.items())
            raise ConfigError(
                f"{name} has another tokenizer, {self.tokenizer}: {common} of its {len(theirs)} ids stand for the same "
                f"token in {tokenizer}: use a teacher of the same, or teach by text, fp8moe distill generate"
            )


class Taught:
    """The steps of a run with a teacher."""

    def __init__(self, teacher: TeacherSource) -> None:
        self._teacher = teacher
        self._loss: TeacherLoss | None = None

    def open_data(self, config: TrainConfig, mesh: Mesh) -> Data:
        """What the run reads without a teacher. Raises ConfigError and DataError."""
        self._teacher.check(config)
        data = open_files(config, mesh)
        tokenizer = None if data.tokenizer is None else data.tokenizer.path
        self._teacher.check_tokenizer(tokenizer, f"distill.teacher={config.distill.teacher}")
        return data

    def begin(self, run: Run) -> None:
        """Load the teacher's weights."""
        source = self._teacher
        self._model = load_model(source.config, run.mesh, run.device, source.weights)
        size, mode = count_parameters(source.config.model).total, source.config.precision.mode.value
        logger.info("the teacher %s has %.3g parameters, in %s", run.config.distill.teacher, size, mode)

    def work(self, run: Run) -> StepWork:
        """The next batch, with what the teacher says of it."""
        distill = run.config.distill
        batches, counts = next_batches(run)
        with span("teacher"):
            found = [teacher_topk(self._model, batch, distill.topk, distill.temperature) for batch in batches]
        self._loss = TeacherLoss(found, distill, run.device)
        return StepWork(batches, counts, self._loss)

    def figures(self, run: Run) -> Mapping[str, Any]:
        """The KL of the step just done."""
        assert self._loss is not None
        return {"distill_kl": self._loss.mean_kl(run.mesh)}

    def score(self, run: Run) -> Mapping[str, Any]:
        """Nothing beside the validation loss, which is the cross entropy."""
        return {}
