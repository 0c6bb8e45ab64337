"""The run directory: made by rank 0, one a run, never overwritten.

    config.yaml  config-STEP.yaml  tokenizer.json  metrics.jsonl  summary.json  checkpoints/step-N/  logs/rank-N.log

It is self-contained: a run that goes on takes its configuration from there, and whoever decodes its tokens the
tokenizer. config.yaml is that of the newest start, config-STEP.yaml that of the start after so many steps.

The rules are checked twice: by the launcher, so that a mistake costs one sentence and no processes, and by rank 0,
because another run may have taken the directory in between.
"""

from __future__ import annotations

import time
from pathlib import Path

from fp8moe.data.durable import copy_file, make_folder, sync, write_text
from fp8moe.errors import ConfigError
from fp8moe.train.checkpoint.location import location

DEFAULT_PARENT = Path("runs")
LOGS = "logs"


def check_run_dir(run_dir: str | None, resume: str) -> None:
    """Raises ConfigError unless a run may write to `run_dir`; makes nothing.

    A fresh run (`resume=none`, or from a checkpoint elsewhere) needs a new or empty directory; `resume=auto` goes on in
    the one it is given, or starts in it when it is empty. A directory with nothing but logs, of a start that failed,
    counts as empty.
    """
    here = resume in ("auto", "required")
    if run_dir is None:
        if here:
            raise ConfigError(f"resume={resume} goes on in a run directory and run_dir is not set: add run_dir=PATH")
        return
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file and must be a directory: use another run_dir")
    if here or not path.is_dir():
        return
    resumed = None if resume == "none" else location(resume)
    if isinstance(resumed, Path) and path.resolve() in (resumed.resolve(), *resumed.resolve().parents):
        return
    count = sum(1 for entry in path.iterdir() if entry.name != LOGS)
    if count:
        raise ConfigError(
            f"run_dir={run_dir} holds {count} entries and a fresh run needs an empty directory: use resume=auto to go "
            "on, or another run_dir"
        )


def make_run_dir(run_dir: str | None, name: str, resume: str) -> Path:
    """Make the directory (rank 0 only) and return its path: `run_dir`, or runs/TIME-NAME, numbered if that is taken."""
    if run_dir is not None:
        check_run_dir(run_dir, resume)
        path = Path(run_dir)
        make_folder(path)
    else:
        path = _new_directory(DEFAULT_PARENT, f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    (path / LOGS).mkdir(exist_ok=True)
    return path


def describe_start(run_dir: Path, step: int, config: str, tokenizer: Path | None) -> None:
    """Write what a start after `step` steps was configured with (`config`, YAML), and keep a copy of its tokenizer."""
    for name in (f"config-{step}.yaml", "config.yaml"):
        write_text(run_dir / name, config)
    if tokenizer is not None and not _same_file(tokenizer, run_dir / "tokenizer.json"):
        copy_file(tokenizer, run_dir / "tokenizer.json")


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and other.samefile(one)


def _new_directory(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            make_folder(parent)
            path.mkdir()
            sync(parent)
            return path
        except FileExistsError:
            number += 1
