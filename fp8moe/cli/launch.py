"""Launcher of worker processes (torch's elastic agent), and how a worker reports its failure.

`fp8moe train --nproc N` is torchrun with three differences: the agent runs in this process, the exit code is the failed
rank's own (torchrun returns 1 for all), and the last line is that rank's message. Each worker is a new process with the
same command line, RANK and the rest of torchrun's environment, so a worker is the same program under torchrun, Slurm
and this launcher. Refused: forking workers with torch already loaded, which starts in a tenth of the time and
breaks with CUDA and with threads.

When one rank fails the others fail a moment later, on messages that never arrive; the agent picks the first failure by
whole seconds. Workers therefore write to their error file (torch's protocol, which torchrun shows too) a precise time
and whether a peer's failure was the cause (`secondary`). A rank that was killed writes nothing; the launcher then finds
the rank that waits for it, and the collective, in the files of the hang detector (`parallel.hang`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8moe.cli.command import Failure, explain
from fp8moe.cli.threads import choose_threads, usable_cores
from fp8moe.errors import EXIT, ConfigError
from fp8moe.train.signals import SIGNALS

LAUNCHED = "FP8MOE_LAUNCHED"  # set for the workers of `launch`, which prints their failure
DEFAULT_PROCESSES = 4
SCRATCH, OWNER = "fp8moe-launch-", "owner.json"  # the temporary folder's name begins so, and holds this file


def is_worker() -> bool:
    """Whether RANK is set: this launcher, torchrun or a script started this process as one of many."""
    return "RANK" in os.environ


def count_processes(text: str) -> int:
    """Processes that `--nproc` asks for: a number, or `auto`, one a GPU, 4 without GPUs. Raises ConfigError."""
    if text == "auto":
        import torch

        return torch.cuda.device_count() or DEFAULT_PROCESSES
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--nproc={text} must be a whole number of at least 1, or auto")
    return int(text)


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m fp8moe ARGUMENTS` on `num_processes` ranks of this machine; the exit code of the rank that failed.

    Its message is printed last, on stderr. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the workers, which save
    the run and end with 75; where they could not, the code is 128 + the signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from fp8moe.cli import loopback

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the last line says it
    loopback.register()
    with _scratch() as folder, _environment(num_processes, folder):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend=loopback.NAME,
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle=",".join(one.name for one in SIGNALS),
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fp8moe", *arguments)
        except ChildFailedError as error:
            code, sentence = _cause(error.failures, Path(folder))
        except SignalException as stopped:
            code, sentence = 128 + stopped.sigval.value, f"stopped by {stopped.sigval.name}, workers included"
            if said := _preempted(Path(folder), num_processes):
                code, sentence = EXIT["preempted"], said
        else:
            return 0
    sys.stdout.flush()
    print(f"fp8moe: {sentence}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A temporary folder; those of launchers that were killed are removed."""
    from fp8moe.parallel.place import process_state, this_process

    mine = this_process()
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            owner = json.loads(old.read_text())
            if owner["host"] == mine["host"] is not None and process_state(owner["pid"])[1] != owner["started"]:
                shutil.rmtree(old.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        (Path(folder) / OWNER).write_text(json.dumps(mine))
        yield folder


def _preempted(folder: Path, num_processes: int) -> str | None:
    """What the workers said in their error files, if all were preempted."""
    said = [json.loads(path.read_text())["message"] for path in folder.rglob("error.json")]
    if len(said) == num_processes and all(one["errorCode"] == EXIT["preempted"] for one in said):
        return str(said[0]["message"])
    return None


@contextlib.contextmanager
def _environment(num_processes: int, notes: str) -> Iterator[None]:
    from fp8moe.parallel.hang import NOTES

    threads = str(max(1, usable_cores() // num_processes))
    defaults = {LAUNCHED: "1", NOTES: notes, "OMP_NUM_THREADS": threads}
    if sys.platform == "linux":
        # gloo looks its address up by the host's name, which many laptops and containers can't resolve; and all ranks
        # are here, so nothing listens to other machines.
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    mine = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]


def _cause(failures: dict[int, Any], notes: Path) -> tuple[int, str]:
    """Exit code and sentence of the failure that caused the others (torch's `ProcessFailure` by rank)."""
    rank = min(failures, key=lambda r: _order(failures[r]))
    failure = failures[rank]
    message = failure.message
    if isinstance(message, dict):
        # A shared error (a setting, the corpus) is every rank's, so none is named.
        shared = message["extraInfo"].get("shared")
        return failure.exitcode, message["message"] if shared else f"rank {rank}: {message['message']}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        why = "; the system sends it when memory runs out" if name == "SIGKILL" else ""
        return 128 - failure.exitcode, f"rank {rank}: ended by {name}{why}{_waiting_rank(rank, notes)}"
    return failure.exitcode, f"rank {rank}: ended with exit code {failure.exitcode} and no message"


def _waiting_rank(lost: int, notes: Path) -> str:
    """The rank that waits for `lost` and in which collective, by each rank's file; "" if `lost` joined none."""
    states = {int(path.stem.removeprefix("rank-")): json.loads(path.read_text()) for path in notes.glob("rank-*.json")
              if path.stat().st_size}  # fmt: skip
    if lost not in states:
        return ""
    mine = states.pop(lost)
    for rank, theirs in sorted(states.items()):
        for group, (number, name, ranks) in theirs["groups"].items():
            if group in mine["groups"] and number > mine["groups"][group][0]:
                return f"; rank {rank} waits for it in {name}, number {number} of {group} (ranks {ranks})"
    number, name, ranks = mine["groups"][mine["last"]]
    return f"; its last message was {name}, number {number} of {mine['last']} (ranks {ranks})"


def _order(failure: Any) -> tuple[int, float]:
    """Sort key, the likeliest cause first: an own error, an end without a message, a lost peer, the agent's SIGTERM."""
    if failure.exitcode == -signal.SIGTERM:
        return (3, 0.0)
    if not isinstance(failure.message, dict):
        return (1, failure.timestamp)
    extra = failure.message["extraInfo"]
    return (2 if extra.get("secondary") else 0, extra.get("time", failure.timestamp))


def report(failure: Failure) -> None:
    """In a worker: write `failure` to the error file; print it only if neither the launcher nor another rank does."""
    rank = os.environ.get("RANK", "0")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {
            "py_callstack": failure.traceback or failure.sentence,
            "timestamp": str(int(time.time())),
            "time": time.time(),
            "secondary": failure.secondary,
            "shared": failure.shared,
        }
        content = {"message": {"message": failure.sentence, "errorCode": failure.code, "extraInfo": extra}}
        with open(path, "w", encoding="utf-8") as handle:
            json.dump(content, handle)
    if LAUNCHED in os.environ or (failure.shared and rank != "0"):
        return
    if failure.traceback:
        print(failure.traceback, file=sys.stderr, end="")
    from fp8moe.parallel.place import rank_in_words

    prefix = "" if failure.shared else f"{rank_in_words(int(rank))}: "
    print(f"fp8moe: {prefix}{failure.sentence}", file=sys.stderr)


def die_with_launcher() -> None:
    """Under an elastic agent: end together with it when it is killed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request: the signal will not come
        os._exit(1)


def end_worker(error: Exception) -> None:
    """Report `error` and end this process at once: an ordinary exit would wait for collectives that no rank joins."""
    failure = explain(error)
    report(failure)
    if failure.code == EXIT["hang"]:
        from fp8moe.parallel import hang

        hang.end_frozen()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.code)


def run_command(name: str, argv: Sequence[str], nproc: str | None, command: Callable[[int], None]) -> int:
    """Run `command(processes)` of `fp8moe NAME argv` here: in this process, as one rank of many, or as the launcher of
    `--nproc`, which runs it on no rank but starts them. For commands that keep no state a signal would have to save."""
    if is_worker():
        from fp8moe.train.rendezvous import place

        die_with_launcher()
        try:
            if nproc is not None and LAUNCHED not in os.environ:
                raise ConfigError(f"--nproc={nproc} starts processes and RANK is set: leave --nproc out")
            command(place(os.environ).world_size)
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
        except Exception as error:
            end_worker(error)
        return 0
    if nproc is None:
        if said := choose_threads(os.environ):
            print(said, file=sys.stderr)
        command(1)
        return 0
    return launch([name, *argv], count_processes(nproc))
