"""state.json: the numbers of a checkpoint, what wrote it, and whether a run may go on from it.

What would make the resumed run another run (model, seed, seq_len, optimizer) is compared before a tensor is read and
refused in one sentence. A new run that begins from weights may extend their context: its YaRN may be another than
theirs, or the first. One that drops it is refused, since the weights were trained with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fp8moe.errors import ConfigError, DataError
from fp8moe.model.config import ModelConfig
from fp8moe.train.checkpoint.files import folder_of, read_text, reason
from fp8moe.train.checkpoint.location import Location

FORMAT = 5  # 1: the model in one flat list, 2: torch's pickled index, 3: tensors in shape, 4: MTP joined the other way
STATE_FILE = "state.json"
# Fields of the model's configuration that a resumed run may change: no tensor's shape or meaning depends on them.
FREE_FIELDS = {
    *("attention.backend", "router.force_balance", "router.aux_loss_alpha", "router.bias_gamma"),
    *("mtp_weight", "init_std", "max_seq_len"),
}


@dataclass(frozen=True)
class RunState:
    """Numbers of a checkpoint: steps and updates done, samples consumed, steps skipped, the run's seed and seq_len.

    data: the identity of its data (`data.identity`); None in checkpoints that were written without. optimizer: whose
    state it holds. skipped_in_a_row: steps skipped since the last that counted; 0 in checkpoints written without.
    """

    step: int
    updates: int
    consumed: int
    skipped: int
    seed: int
    seq_len: int
    data: dict[str, Any] | None = None
    optimizer: str = "adamw"
    skipped_in_a_row: int = 0


def state_text(state: RunState, model: ModelConfig, origin: Mapping[str, Any]) -> str:
    """What state.json holds: the numbers, the model's configuration, and `origin`: the whole configuration, which a run
    goes on with that has no other, versions, commit."""
    return json.dumps({"format": FORMAT, **asdict(state), "model": asdict(model), **origin}, indent=1) + "\n"


def read_state(
    path: Location,
    model: ModelConfig,
    *,
    seed: int | None = None,
    seq_len: int | None = None,
    optimizer: str | None = None,
    extending: bool = False,
    advice: str = "",
) -> RunState:
    """Numbers of the checkpoint at `path`. extending: the model's YaRN may be another than the checkpoint's, not none.
    advice: what else to do where the model is another, after ", or ".

    Raises ConfigError unless its format and model, and the seed, seq_len and optimizer that are given, are these.
    """
    try:
        content = json.loads(read_text(folder_of(path), STATE_FILE))
        _check_format(path, content["format"])
        later = {"data": None, "skipped_in_a_row": 0}  # a checkpoint of this format may lack them
        names = [field.name for field in dataclasses.fields(RunState)]
        state = RunState(**{name: content.get(name, later[name]) if name in later else content[name] for name in names})
        theirs = _completed(content["model"], model)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/state.json can't be read ({reason(error)}): resume from another checkpoint") from error
    ours = json.loads(json.dumps(asdict(model)))
    if found := list(differences(extended(theirs, ours) if extending else theirs, ours)):
        instead = advice and f", or {advice}"
        raise ConfigError(f"{path} is a checkpoint of another model: {_other_model(found)}{instead}")
    for name, here, there in (
        ("seed", seed, state.seed),
        ("seq_len", seq_len, state.seq_len),
        ("optimizer.kind", optimizer, state.optimizer),
    ):
        if here is not None and here != there:
            raise ConfigError(f"{path} was trained with {name}={there} and this run has {name}={here}: use {there}")
    return state


def _other_model(found: Sequence[tuple[str, str, str]]) -> str:
    """The first setting of a model that differs, how many more do, and what to use."""
    key, there, here = found[0]
    others = f", and {len(found) - 1} more model setting{'s' * (len(found) > 2)}" if len(found) > 1 else ""
    use = "its own" if there == "None" or there[0] in "[{(" else f"model.{key}={there}"
    return f"model.{key}={there} there and {here} here{others}: use {use}"


def _check_format(path: Location, found: int) -> None:
    if found != FORMAT:
        raise ConfigError(
            f"checkpoint format {found} is of {'an earlier' if found < FORMAT else 'a later'} version, which this one "
            f"cannot load: {path} needs the version that wrote it, this one reads format {FORMAT}; use resume=none to "
            "start a new run"
        )


def _completed(theirs: Mapping[str, Any], ours: Any) -> dict[str, Any]:
    """A checkpoint's configuration with the defaults of the keys that earlier versions of this format did not have."""
    found = dict(theirs)
    for field in dataclasses.fields(ours):
        here = getattr(ours, field.name)
        if dataclasses.is_dataclass(here) and isinstance(found.get(field.name), dict):
            inner = dict(found[field.name])
            found[field.name] = _completed(inner, here)
        elif field.default is not dataclasses.MISSING:
            found.setdefault(field.name, json.loads(json.dumps(field.default)))
    return found


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, their value, our value) of every field that differs and is not free, in order of the keys."""
    for name in sorted(theirs.keys() | ours.keys()):
        key, there, here = f"{group}{name}", theirs.get(name), ours.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from differences(there, here, f"{key}.")
        elif there != here and key not in FREE_FIELDS:
            yield key, repr(there), repr(here)


def extended(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Their model with our YaRN, where we have one: what a context extension of their weights changes beside
    max_seq_len, which is free. Rotations and the softmax scale have no tensors."""
    yarn = ours["attention"]["yarn"]
    return theirs if yarn is None else {**theirs, "attention": {**theirs["attention"], "yarn": yarn}}


def run_configuration(path: Location) -> dict[str, Any] | None:
    """The whole configuration of the run that wrote the checkpoint at `path`; None where it can't be read."""
    try:
        config = json.loads(read_text(folder_of(path), STATE_FILE))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if isinstance(config, dict) else None
