"""Hydra's part of a configuration: settings to a plain dict, composed from the files of configs/.

Hydra and OmegaConf are used here and in `cluster` only. The compose API is used and not `@hydra.main`, which makes a
run directory a rank, sets up logging, and exits 1 on an unknown key.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fp8moe
from fp8moe.cli.experiment_file import in_words, read_experiment, refuse_resolvers
from fp8moe.cli.setting_words import no_setting, unreadable
from fp8moe.errors import ConfigError

_FILE = "file-"  # before the name of an experiment that is a file of the user's
CONFIGS = Path(fp8moe.__file__).resolve().parent / "configs"


@functools.lru_cache(maxsize=1024)  # several readers ask for each, and its grammar takes a millisecond
def parse(setting: str) -> Override:
    """One setting as hydra reads it, not to be changed. Raises ConfigError unless it is one."""
    if ("=" not in setting and not setting.startswith("~")) or setting.startswith("="):
        raise ConfigError(no_setting(setting, _choice_of(setting)))
    try:
        return OverridesParser.create().parse_override(setting)
    except HydraException as error:
        raise ConfigError(unreadable(setting, _first_line(error), _reads)) from error


def _choice_of(word: str) -> str | None:
    """The setting that a word alone may mean: a choice of a group, or a file of settings; None: no one."""
    if is_file(word) and Path(word).is_file():
        return f"experiment={word}"
    if not word.isidentifier():
        return None
    return next(
        (f"{group}={word}" for group in sorted(config_groups()) if (CONFIGS / group / f"{word}.yaml").is_file()), None
    )


def _reads(setting: str) -> bool:
    """Whether hydra reads a setting."""
    try:
        OverridesParser.create().parse_override(setting)
    except HydraException:
        return False
    return True


def config_groups() -> set[str]:
    """Names of a run's groups in configs/."""
    return {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"cluster"}


@functools.lru_cache(maxsize=256)
def kept_tree(settings: tuple[str, ...]) -> dict[str, Any]:
    """`tree_by_hydra` of settings that name no file, so that it depends on them alone; not to be changed.

    A command composes its settings twice and the defaults for its report, and hydra takes a tenth of a second a time.
    """
    return tree_by_hydra(settings)


def tree_by_hydra(settings: tuple[str, ...]) -> dict[str, Any]:
    """The defaults changed by checked settings, as a plain dict with its values resolved."""
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            initialize_config_dir(str(CONFIGS), version_base="1.3"),
        ):
            names = [_for_hydra(setting, Path(folder)) for setting in settings]
            words = [f"hydra.searchpath=[file://{folder}]", *names]
            tree = hydra_compose("train", words, return_hydra_config=True)
            choices = tree.hydra.runtime.choices
            OmegaConf.set_struct(tree, False)
            del tree["hydra"]
            refuse_resolvers(OmegaConf.to_container(tree), "")
            if tree.get("name") is None:
                tree["name"] = str(choices.get("experiment") or choices["model"]).removeprefix(_FILE)
            plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except yaml.YAMLError as error:  # of hydra's loader, which refuses a key that is given twice
        raise ConfigError(f"a file of settings can't be read ({in_words(error)}): write each key once") from error
    except (HydraException, OmegaConfBaseException) as error:
        line = _first_line(error)
        if there := re.fullmatch(r"Could not append to config\. An item is already at '(.+)'", line):
            line = f"+{there[1]} would add a key that is there: write {there[1]}=VALUE"
        raise ConfigError(line) from error
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _for_hydra(setting: str, folder: Path) -> str:
    """`setting` as hydra takes it: a file of the user's is put into `folder`, where hydra looks for groups too."""
    override = parse(setting)
    if override.key_or_group not in config_groups() and override.type is OverrideType.CHANGE:
        return f"++{setting}"  # adds the group that is null, of which the key is one: attention.yarn
    if override.key_or_group != "experiment" or not is_file(override.value()):
        return setting
    path = Path(str(override.value())).expanduser()
    text = read_experiment(path)
    (folder / "experiment").mkdir(exist_ok=True)
    name = _FILE + path.stem
    (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    return f"experiment={name}"


def is_file(value: object) -> bool:
    """Whether a value names a file of settings."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or str(error.__cause__ or "").strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".").replace("++", "", 1)  # which `_for_hydra` added
