"""The run directory: made by rank 0, one a run, never overwritten.

    config.yaml  config-STEP.yaml  tokenizer.json  metrics.jsonl  summary.json  checkpoints/step-N/  logs/rank-N.log
    events.jsonl  expert_load.jsonl  ranks.jsonl  samples.json  report.html
    metrics.prom (the latest figures, for Prometheus)  tensorboard/  wandb/  wandb-id (where those are used)
    rollouts/  rollout_weights/ (fp8moe grpo: batches and completions in use, exports for a server)
    lock (while a run writes here)  preempted (what was saved, if a signal ended the run)  starts.jsonl

It is self-contained: a run that goes on takes its configuration from there, and whoever decodes its tokens the
tokenizer. config.yaml is that of the newest start, config-STEP.yaml that of the start after so many steps.

The rules are checked twice: by the launcher, so that a mistake costs one sentence and no processes, and by rank 0,
because another run may have taken the directory in between.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from fp8moe.data.durable import copy_file, make_folder, sync, write_text
from fp8moe.errors import ConfigError
from fp8moe.limits import shown
from fp8moe.train.checkpoint.location import location
from fp8moe.train.json_lines import METRICS, read_lines
from fp8moe.train.run_lock import LOCK_FILE, acquire, check_unlocked, release

DEFAULT_PARENT = Path("runs")
LOGS = "logs"
PREEMPTED = "preempted"  # for launch scripts, to which torchrun does not pass exit code 75 on
STARTS = "starts.jsonl"
MAX_STARTS = 3  # starts in a row that may make no new step
_OF_A_START = {LOGS, LOCK_FILE, PREEMPTED, STARTS}  # what a start that failed leaves
MOST_NAME = 200  # bytes, of the 255 that file systems take, a time and a number beside it


def check_name(name: str) -> None:
    """Raises ConfigError unless a run's name can be the end of a folder's name: one part of a path, not too long."""
    plain = "-".join(part for part in name.replace("\\", "/").split("/") if part.strip(". "))[:MOST_NAME]
    if name == ".." or name != Path(name).name or "\\" in name or len(name.encode()) > MOST_NAME:
        raise ConfigError(
            f"name={shown(name)} must be one part of a path, of at most {MOST_NAME} bytes: use {shown(plain or 'run')}"
        )


def check_run_dir(run_dir: str | None, resume: str) -> None:
    """Raises ConfigError unless a run may write to `run_dir`; makes nothing.

    A fresh run (`resume=none`, or from a checkpoint elsewhere) needs a new or empty directory; `resume=auto` goes on in
    the one it is given, or starts in it when it is empty. A directory with nothing but logs, of a start that failed,
    counts as empty. Nothing may write where a run of this machine is alive.
    """
    here = resume in ("auto", "required")
    if run_dir is None:
        if here:
            raise ConfigError(f"resume={resume} goes on in a run directory and run_dir is not set: add run_dir=PATH")
        return
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file and must be a directory: use another run_dir")
    above = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if not above.is_dir():
        raise ConfigError(f"run_dir={run_dir} lies below {above}, which is a file: use another run_dir")
    check_unlocked(path)
    if here or not path.is_dir():
        return
    resumed = None if resume == "none" else location(resume)
    if isinstance(resumed, Path) and path.resolve() in (resumed.resolve(), *resumed.resolve().parents):
        return
    count = sum(1 for entry in path.iterdir() if entry.name not in _OF_A_START)
    if count:
        is_run = any((path / name).exists() for name in ("config.yaml", METRICS, "checkpoints"))
        raise ConfigError(
            f"run_dir={run_dir} holds {count} entries and a fresh run needs an empty directory: use "
            f"{'resume=auto to go on, or ' if is_run else ''}another run_dir"
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


def claim(run_dir: Path, resume: str) -> None:
    """Lock the directory and count the start. Raises ConfigError where a live run has it, or by `count_start`."""
    acquire(run_dir)
    try:
        count_start(run_dir, refuse=resume != "none")
    except BaseException:
        release(run_dir)
        raise


def count_start(path: Path, *, refuse: bool) -> None:
    """Note that a run starts here, and at which step the last one ended.

    Raises ConfigError, if asked to, where the last MAX_STARTS starts have made no new step: a further one would fail as
    they did. One that a signal ended does not count.
    """
    starts = path / STARTS
    before = read_lines(starts)[0]
    if (path / PREEMPTED).exists():
        (path / PREEMPTED).unlink()
        before = before[:-1]
    reached = [int(line["step"]) for line in (*before, *read_lines(path / METRICS)[0]) if "step" in line]
    step = max(reached, default=0)
    if refuse and len(before) >= MAX_STARTS and all(int(line["step"]) >= step for line in before[-MAX_STARTS:]):
        raise ConfigError(
            f"{path} was started {MAX_STARTS} times since it last made a new step, step {step}: see why in its logs; "
            f"to start it again delete {starts}"
        )
    lines = [*before[-MAX_STARTS:], {"start": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step}]
    scratch = starts.with_suffix(".tmp")
    scratch.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    scratch.replace(starts)


def mark_preempted(run_dir: Path, sentence: str) -> None:
    """Leave word for launch scripts that a signal ended the run, and how: it is to be started again."""
    (run_dir / PREEMPTED).write_text(f"{sentence}\n", encoding="utf-8")


def describe_start(
    run_dir: Path, step: int, config: str, tokenizer: Path | None, beside_tokenizer: Mapping[str, str] | None = None
) -> None:
    """Write what a start after `step` steps was configured with (`config`, YAML), and keep a copy of its tokenizer.

    beside_tokenizer: further files of text, by name: those of a chat template.
    """
    for name in (f"config-{step}.yaml", "config.yaml"):
        write_text(run_dir / name, config)
    if tokenizer is not None and not _same_file(tokenizer, run_dir / "tokenizer.json"):
        copy_file(tokenizer, run_dir / "tokenizer.json")
    for name, text in (beside_tokenizer or {}).items():
        write_text(run_dir / name, text)


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
