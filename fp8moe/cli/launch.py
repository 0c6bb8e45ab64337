"""Processes: torch's elastic agent run in this one, and what a worker does so that its end is clean and understood.

`fp8moe train --nproc N` is torchrun with three differences: the agent runs in-process, the exit code is the failed
rank's own (bare torchrun returns 1 for all), and the last line is that rank's message. Each worker is a fresh process
running the same command line with RANK and the rest of torchrun's environment, so that a worker under bare torchrun,
Slurm or this launcher is the same program. Refused: forking warm workers, which starts in a tenth of the time and
breaks with CUDA and with threads.

When one rank ends badly the others fail too, a moment later, on messages that never come; the agent's own choice of
the first failure goes by whole seconds. Workers therefore note in their error file (torch's protocol, so that bare
torchrun shows it as well) a precise time and whether they are the cause or a mere witness. A rank that was killed notes
nothing; who waited for it, and in which collective, the launcher reads from what the watch has noted of every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8moe.cli.command import Failure

LAUNCHED = "FP8MOE_LAUNCHED"  # set for the workers of `launch`: it prints their failure, they need not
DEFAULT_PROCESSES = 4
RENDEZVOUS_SECONDS = 300


def is_worker() -> bool:
    """Whether a launcher (this one, torchrun, or a script that sets RANK) started this process as one of many."""
    return "RANK" in os.environ


def count_processes(text: str) -> int:
    """`--nproc`: a number, or `auto`: one for every GPU, four where there is none. Raises ValueError."""
    if text == "auto":
        import torch

        return torch.cuda.device_count() or DEFAULT_PROCESSES
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--nproc={text} must be a whole number of at least 1, or auto")
    return int(text)


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m fp8moe ARGUMENTS` on `num_processes` ranks of this machine; the exit code of the rank that failed.

    Its message is printed last, on stderr. SIGINT, SIGTERM and SIGHUP end the workers first and give 128 + the signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they would say, the last line says
    with tempfile.TemporaryDirectory(prefix="fp8moe-launch-") as folder, _environment(num_processes, folder):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"timeout": RENDEZVOUS_SECONDS},
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fp8moe", *arguments)
        except ChildFailedError as error:
            code, sentence = _cause(error.failures, Path(folder))
        except SignalException as stopped:
            code, sentence = 128 + stopped.sigval.value, f"stopped by {stopped.sigval.name}, workers included"
        else:
            return 0
    sys.stdout.flush()
    print(f"fp8moe: {sentence}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _environment(num_processes: int, notes: str) -> Iterator[None]:
    from fp8moe.parallel.hang import NOTES

    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    defaults = {LAUNCHED: "1", NOTES: notes, "OMP_NUM_THREADS": threads}
    if sys.platform == "linux":
        # gloo looks its address up by the host's name, which many laptops and containers can't resolve.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    mine = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]


def _cause(failures: dict[int, Any], notes: Path) -> tuple[int, str]:
    """Exit code and sentence of the rank that failed first by itself (torch's `ProcessFailure` by rank)."""
    rank = min(failures, key=lambda r: _suspicion(failures[r]))
    failure = failures[rank]
    message = failure.message
    if isinstance(message, dict):
        # An error every rank finds by itself (a setting, the corpus) is nobody's in particular.
        shared = message["extraInfo"].get("shared")
        return failure.exitcode, message["message"] if shared else f"rank {rank}: {message['message']}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        why = "; the kernel kills so when memory runs out" if name == "SIGKILL" else ""
        return 128 - failure.exitcode, f"rank {rank}: ended by {name}{why}{_who_waits(rank, notes)}"
    return failure.exitcode, f"rank {rank}: ended with exit code {failure.exitcode} and no message"


def _who_waits(lost: int, notes: Path) -> str:
    """Where the others wait for rank `lost`, by what each noted as it joined collectives; "" if it joined none."""
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


def _suspicion(failure: Any) -> tuple[int, float]:
    """Sort key, smallest first: its own fault, then ended without a word, a lost peer, stopped by the agent."""
    if failure.exitcode == -signal.SIGTERM:
        return (3, 0.0)
    if not isinstance(failure.message, dict):
        return (1, failure.timestamp)
    extra = failure.message["extraInfo"]
    return (2 if extra.get("secondary") else 0, extra.get("time", failure.timestamp))


def report(failure: Failure) -> None:
    """In a worker: leave `failure` where its launcher finds it; on stderr only if nobody else prints it."""
    rank = int(os.environ.get("RANK", "0"))
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
    if LAUNCHED in os.environ or (failure.shared and rank != 0):
        return
    if failure.traceback:
        print(failure.traceback, file=sys.stderr, end="")
    prefix = "" if failure.shared else f"rank {rank}: "
    print(f"fp8moe: {prefix}{failure.sentence}", file=sys.stderr)


def die_with_launcher() -> None:
    """Under an elastic agent: end with it, whether by Ctrl-C or because it died with no chance to tell its workers."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once and in silence: the launcher speaks for all
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request: nobody will send the signal
        os._exit(1)
