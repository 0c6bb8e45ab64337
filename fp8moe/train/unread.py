"""Settings that a run would take and never read: refused, so that nobody believes them in force.

Which are read follows from data.source: problems are learned from by `fp8moe grpo`, everything else by `fp8moe train`
and `fp8moe sft`. A value that is the default is never refused. Nor is what belongs to a switch that is off
(distill.topk without a teacher, grpo.digits beside data.paths): whoever takes a switch back need not take back its
details. Checked where a run is laid out, and not where a configuration is made: a run that was trained with such a
setting can still be read.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from fp8moe.data.sources import DataConfig
from fp8moe.errors import ConfigError
from fp8moe.train.batch import BatchConfig
from fp8moe.train.grpo_config import GrpoConfig
from fp8moe.train.optimizer import OptimizerConfig
from fp8moe.train.validation import ValidationConfig


class Settings(Protocol):
    """Of a run's configuration (`train.config.TrainConfig`) what is looked at here."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def grpo(self) -> GrpoConfig: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...
    @property
    def steps(self) -> int: ...
    @property
    def epochs(self) -> float | None: ...


def check_unread(config: Settings) -> None:
    """Raise ConfigError where a setting is not its default and no part of the run reads it."""
    if config.data.source == "problems":
        _check_grpo(config)
    else:
        for name in (one.name for one in dataclasses.fields(GrpoConfig)):
            if _is_changed(config.grpo, name):
                value = _typed(getattr(config.grpo, name))
                raise ConfigError(
                    f"grpo.{name}={value} is of fp8moe grpo, which learns from problems, and data.source is "
                    f"{config.data.source}: leave grpo.{name} out, or use fp8moe grpo"
                )
        if config.data.source != "chat":
            _refuse(config, "chat_template", "a chat template is of conversations and problems", "null")
    if config.data.source != "chat":
        _refuse(config, "long_conversations", "conversations are of data.source=chat", "truncate")


def _check_grpo(config: Settings) -> None:
    grpo, batch = config.grpo, config.batch
    if batch.ramp_from is not None:
        raise ConfigError(
            f"batch.ramp_from={batch.ramp_from} makes a batch grow and fp8moe grpo takes the "
            f"{grpo.group_samples // grpo.minibatches} samples of an update at every step: use batch.ramp_from=null"
        )
    if config.epochs is not None:
        raise ConfigError(
            f"epochs={config.epochs:g} are passes over data and fp8moe grpo draws its problems for as many steps as it "
            f"is given: use epochs=null with steps={config.steps}, or grpo.epochs for passes over a batch of rollouts"
        )
    if config.data.weights:
        raise ConfigError(
            f"data.weights has {len(config.data.weights)} entries and the problems of all data.paths are drawn alike: "
            "use data.weights=[]"
        )
    _refuse(config, "fim_rate", "fill-in-the-middle is of token files", "0")
    _refuse(config, "packing", "samples of a policy are packed by data.document_mask", "stream")
    until = config.optimizer.schedule.mtp_weight_until
    if until is not None:
        raise ConfigError(
            f"optimizer.schedule.mtp_weight_until={until:g} changes the weight of the MTP loss, and fp8moe grpo has "
            f"grpo.mtp_weight={grpo.mtp_weight:g} throughout: use optimizer.schedule.mtp_weight_until=null"
        )
    if config.validation.completions not in (0, ValidationConfig.completions):
        raise ConfigError(
            f"validation.completions={config.validation.completions} continues held-out text and fp8moe grpo has "
            f"problems, whose answers it scores: use validation.completions={ValidationConfig.completions}, the "
            "default, or fp8moe generate"
        )
    if not config.data.paths and config.data.validation_paths:
        raise ConfigError(
            f"data.validation_paths has {len(config.data.validation_paths)} entries and data.paths is empty, so that "
            f"problems of grpo.task={grpo.task} are held out: name data.paths too, or use data.validation_paths=[]"
        )


def _refuse(config: Settings, name: str, why: str, instead: str) -> None:
    """Raise ConfigError unless the field `name` of the data is its default."""
    if _is_changed(config.data, name):
        raise ConfigError(
            f"data.{name}={_typed(getattr(config.data, name))} is not read with data.source={config.data.source}, "
            f"since {why}: use data.{name}={instead}"
        )


def _is_changed(config: GrpoConfig | DataConfig, name: str) -> bool:
    return bool(getattr(config, name) != getattr(type(config), name))


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
