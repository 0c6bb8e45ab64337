"""The configuration of a run that goes on, or that begins like another: the other run's own, changed by what is typed.

    resume=RUN steps=160      goes on in RUN, whose config.yaml holds for every key that is not typed
    resume=auto run_dir=RUN   the same; without a checkpoint in RUN the run starts at step 0
    resume=URL                goes on from the checkpoints there, with the configuration that the newest of them holds
    --from RUN                a new run with fresh weights and RUN's configuration

Typed are: a key that is given, every key of a group that is chosen (model=tiny; of lr_schedule=wsd those that its file
holds), and of an experiment the keys that it sets to something else than the defaults do. On another number of
processes the layout is chosen anew: parallel.dp, and parallel.ep and batch.micro_batch where they were chosen or do not
fit. Refused: composing from the defaults, as other trainers do: a key that was forgotten then makes another run out of
the old weights, in silence.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fp8moe.cli.compose import Composed, composed, config_groups, keys_in, parse, plain_values, tree_of
from fp8moe.cli.run_kind import check_command
from fp8moe.errors import ConfigError
from fp8moe.limits import shown
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig

CONFIG_FILE = "config.yaml"
_OF_THE_COMMAND = ("resume", "run_dir", "resume_changes")  # of this start alone, never taken from another
_WEIGHTS = ("init_from", "init_from_ema", "init_perturbation")  # of the run, not of one like it


# What every version's configuration of a run has: fields without a default.
_NEEDED = tuple(one.name for one in fields(TrainConfig) if one.default is MISSING and one.default_factory is MISSING)


@dataclass(frozen=True)
class Origin:
    """The run that a configuration was taken from: its directory, or the folder of its checkpoints where those are all
    that there is of it; and whether it goes on or a new one begins."""

    run: checkpoint.Location
    tree: Mapping[str, Any]
    goes_on: bool


def compose_run(
    settings: Sequence[str],
    world_size: int,
    from_run: str | None = None,
    begin: Callable[[Sequence[str]], dict[str, Any]] = tree_of,
    command: str | None = None,
) -> tuple[Composed, Origin | None]:
    """The configuration of `settings` on `world_size` processes, and the run it was taken from, if there is one.

    begin: the tree of the settings of a run that is taken from no other. command: that is to run it; None: any. Raises
    ConfigError or ValueError with one sentence.
    """
    typed = tree_of(settings)
    _check_places(typed)
    origin = _origin(typed, from_run)
    if origin is None:
        tree = begin(settings)
        _steps_or_epochs(tree, settings)
        _check_paths(tree, settings)
        return composed(tree), None
    tree = overlaid(origin.tree, typed, tree_of([]), settings)
    if command is not None:
        named = from_run or (origin.run if typed["resume"] in ("auto", "required") else typed["resume"])
        check_command(command, named, origin.tree, tree, _named(typed, from_run))
    tree |= {key: typed[key] for key in (_OF_THE_COMMAND if origin.goes_on else (*_OF_THE_COMMAND, *_WEIGHTS))}
    if not origin.goes_on:
        tree["checkpoint"]["path"] = typed["checkpoint"]["path"]  # which holds the other run's
    elif typed["run_dir"] is None and isinstance(origin.run, Path) and (origin.run / CONFIG_FILE).is_file():
        tree["run_dir"] = str(origin.run)
    _refit(tree, settings, world_size)
    _steps_or_epochs(tree, settings)
    _check_paths(tree, settings)
    return composed(tree), origin


def _named(typed: Mapping[str, Any], from_run: str | None) -> str:
    """The words of a command line that name the run that a configuration is taken from."""
    if from_run is not None:
        return f"--from {shlex.quote(from_run)}"
    words = shlex.quote(f"resume={typed['resume']}")
    if typed["resume"] not in ("auto", "required"):
        return words
    places = {"run_dir": typed["run_dir"], "checkpoint.path": typed["checkpoint"]["path"]}
    return " ".join([words, *(shlex.quote(f"{key}={value}") for key, value in places.items() if value is not None)])


def note(origin: Origin | None, config: TrainConfig) -> str | None:
    """One line: which run `config` goes on from or begins like, and every key that differs; None for a new run."""
    if origin is None:
        nothing = config.resume == "auto" and checkpoint.find("auto", config.run_dir, config.checkpoint.path) is None
        return f"nothing to resume in {config.run_dir}: starts at step 0" if nothing else None
    now = plain_values(asdict(config))
    differing = [
        f"{key} {_shown(before)} -> {_shown(after)}"
        for key, before, after in differences(origin.tree, now)
        if key not in _OF_THE_COMMAND
    ]
    changed = f"; changed: {', '.join(differing)}" if differing else ", nothing changed"
    if not origin.goes_on:
        return f"a new run with the configuration of {origin.run}{changed}"
    found = checkpoint.find(config.resume, config.run_dir, config.checkpoint.path)
    if found is None:
        return f"nothing to resume in {origin.run}: starts at step 0 with its configuration{changed}"
    step = found.name.removeprefix("step-")
    return f"goes on from {origin.run} step {step} with its configuration{changed}"


def _check_places(typed: Mapping[str, Any]) -> None:
    """Raise ConfigError unless what `_origin` reads, before a configuration is made, is text or left out."""
    group = typed["checkpoint"]
    if not isinstance(group, Mapping):
        raise ConfigError(f"checkpoint={shown(group)} must be a group of keys: write checkpoint.path=PATH")
    places = {"resume": typed["resume"], "run_dir": typed["run_dir"], "checkpoint.path": group.get("path")}
    for key, value in places.items():
        if not isinstance(value, str) and (value is not None or key == "resume"):
            raise ConfigError(
                f"{key}={shown(value)} ({type(value).__name__}) must be text: quote it, '{key}=\"{value!s:.60}\"'"
            )
        checkpoint.refuse_password(key, value)


def _origin(typed: Mapping[str, Any], from_run: str | None) -> Origin | None:
    resume, run_dir, path = typed["resume"], typed["run_dir"], typed["checkpoint"]["path"]
    if from_run is not None:
        if resume != "none":
            raise ConfigError(f"--from begins a new run and resume={resume} goes on with an old one: leave one out")
        other = _with_configuration(Path(from_run))
        return Origin(other, read_configuration(other), goes_on=False)
    if resume == "none":
        return None
    if resume in ("auto", "required"):
        if run_dir is None:
            raise ConfigError(f"resume={resume} goes on in a run directory and run_dir is not set: add run_dir=PATH")
        run: Path | None = Path(run_dir)
    else:
        where = checkpoint.location(resume)
        run = _with_configuration(where) if isinstance(where, Path) else None
    if run is not None and (run / CONFIG_FILE).is_file():
        return Origin(run, read_configuration(run), goes_on=True)
    found = checkpoint.find(resume, run_dir, path)
    stored = None if found is None else checkpoint.run_configuration(found)
    if found is None or stored is None:
        return None  # nothing yet, or a checkpoint that can't be read: `train.config` judges it
    return Origin(found.parent, stored, goes_on=True)


def _with_configuration(run: Path) -> Path:
    """The run directory of a path: itself, or that of the checkpoint or the folder of checkpoints that it is."""
    if (run / CONFIG_FILE).is_file():
        return run
    whole = run.absolute()
    above = whole.parent if whole.name == checkpoint.FOLDER else whole.parent.parent
    return above if (above / CONFIG_FILE).is_file() else run


def read_configuration(run: Path) -> Mapping[str, Any]:
    """The settings of a run directory's config.yaml. Raises ConfigError where it has none."""
    path = run / CONFIG_FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is not YAML"
        raise ConfigError(f"{path} can't be read ({reason}): name a run directory with its {CONFIG_FILE}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings: name a run directory with its {CONFIG_FILE}")
    if missing := [name for name in _NEEDED if name not in tree]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: name a run directory with a whole {CONFIG_FILE}")
    return tree


def overlaid(
    base: Mapping[str, Any], typed: Mapping[str, Any], defaults: Mapping[str, Any], settings: Sequence[str]
) -> dict[str, Any]:
    """`base` with the keys that `settings` typed; `typed` is what the settings give over `defaults` alone."""
    tree = plain_values(base)
    overrides = [parse(setting) for setting in settings]
    groups = config_groups()
    if any(override.key_or_group == "experiment" for override in overrides):
        for key, _, value in differences(defaults, typed):
            _put(tree, key, value)
    for override in overrides:
        key = override.key_or_group
        if key == "lr_schedule":
            for name in keys_in(key, override.value()):
                _put(tree, f"optimizer.schedule.{name}", _get(typed, f"optimizer.schedule.{name}"))
        elif key in groups - {"experiment"}:
            tree[key] = typed[key]
        elif key != "experiment":
            key = _settable(typed, key)
            _put(tree, key, _get(typed, key))
    keys = {override.key_or_group for override in overrides}
    if "data.vocab_size" not in keys and _follows_model(typed if "data" in keys else base):
        _put(tree, "data.vocab_size", _get(tree, "model.vocab_size"))
    return tree


def _follows_model(tree: Mapping[str, Any]) -> bool:
    """Whether token ids end where the model's vocabulary does, as the groups of data have it."""
    data, model = tree.get("data"), tree.get("model")
    return (
        isinstance(data, Mapping) and isinstance(model, Mapping) and data.get("vocab_size") == model.get("vocab_size")
    )


def differences(before: Mapping[str, Any], after: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) of every key that differs, in the order of `after`; None: not there."""
    for name in dict.fromkeys([*after, *before]):
        key, old, new = f"{group}{name}", before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{key}.")
        elif old != new:
            yield key, old, new


def _steps_or_epochs(tree: dict[str, Any], settings: Sequence[str]) -> None:
    """Steps that are typed count, and no epochs of an experiment or another run, unless these are typed too."""
    keys = {parse(setting).key_or_group for setting in settings}
    if "steps" in keys and "epochs" not in keys:
        tree["epochs"] = None


def _check_paths(tree: Mapping[str, Any], settings: Sequence[str]) -> None:
    """Raise ConfigError where data.paths is typed, is empty, and the text that nobody named would be trained on."""
    keys, data = {parse(setting).key_or_group for setting in settings}, tree.get("data")
    if "data.paths" not in keys or keys & {"data", "data.source"} or not isinstance(data, Mapping):
        return
    if data.get("source") == "stdlib" and data.get("paths") == []:
        raise ConfigError(
            "data.paths=[] names 0 files, and data.source=stdlib would train on the text of this Python: name at least "
            "1 with data.source=indexed, or leave data.paths out"
        )


def _refit(tree: dict[str, Any], settings: Sequence[str], world_size: int) -> None:
    """Let go of the layout that `resolve` chose for another number of processes, unless it was typed."""
    keys = {parse(setting).key_or_group for setting in settings}
    parallel, batch = tree["parallel"], tree["batch"]
    if parallel["dp"] is None or parallel["pp"] * parallel["dp"] == world_size or "parallel.dp" in keys:
        return
    before, dp = parallel["dp"], max(1, world_size // parallel["pp"])
    parallel["dp"] = None
    cp = parallel.get("cp", 1)
    chosen = math.gcd(before // cp, tree["model"]["experts"]["num_experts"])  # as `train.config.resolve` does
    if "parallel.ep" not in keys and parallel["ep"] and (parallel["ep"] == chosen or dp % parallel["ep"]):
        parallel["ep"] = None
    sequences, micro_batch = batch["sequences"], batch["micro_batch"]
    whole = micro_batch and micro_batch * before // cp == sequences
    if "batch.micro_batch" not in keys and micro_batch and (whole or sequences % (max(1, dp // cp) * micro_batch)):
        batch["micro_batch"] = None


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        if not isinstance(tree.get(group), dict):
            tree[group] = {}
        tree = tree[group]
    tree[last] = value


def _settable(tree: Mapping[str, Any], key: str) -> str:
    """`key`, or the list that it reaches into: phases of optimizer.schedule.phases.0.until."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        if not isinstance(_get(tree, ".".join(parts[:count])), Mapping):
            return ".".join(parts[:count])
    return key


def _get(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        if part not in value:  # taken away: ~steps
            raise ConfigError(f"{key} must be set: leave ~{key} out")
        value = value[part]
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
