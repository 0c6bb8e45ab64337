"""The teacher that `distill.teacher` names, found for a command that trains.

A run or checkpoint computes in its own precision; a Hugging Face directory names none and computes in the student's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from fp8moe.plan.teacher import TeacherModel
    from fp8moe.post.distill.taught import TeacherSource
    from fp8moe.train.config import TrainConfig


def teacher_model(config: TrainConfig) -> TeacherModel | None:
    """What a plan needs of the teacher of a run, which need not be resolved; None without one. Raises ConfigError."""
    from fp8moe.plan.teacher import TeacherModel

    teacher = _open_teacher(config)
    return None if teacher is None else TeacherModel(teacher.config.model, teacher.config.recipe)


def find_teacher(config: TrainConfig) -> TeacherSource | None:
    """The teacher of a resolved run, checked against it; None without one. Loads no weights.

    Raises ConfigError or ValueError with one sentence.
    """
    teacher = _open_teacher(config)
    if teacher is not None:
        teacher.check(config)
    return teacher


def _open_teacher(config: TrainConfig) -> TeacherSource | None:
    """The same, not checked against the run."""
    if config.distill.teacher is None:
        return None
    from fp8moe.cli.compose import composed, tree_of
    from fp8moe.cli.resume import overlaid
    from fp8moe.cli.trained import find_settings
    from fp8moe.interop.hf_model import HfModel
    from fp8moe.post.distill.taught import TeacherSource

    try:
        found = find_settings(config.distill.teacher)
    except ConfigError as error:
        raise ConfigError(f"distill.teacher can't be opened, since {error}") from error
    theirs = composed(overlaid(found.tree, tree_of([]), tree_of([]), [])).config
    if isinstance(found.source, HfModel):
        found.source.check(theirs.model)
        theirs = replace(theirs, precision=config.precision)
    has_tokenizer = found.tokenizer is not None and found.tokenizer.is_file()
    return TeacherSource(theirs, found.source, found.tokenizer if has_tokenizer else None)
