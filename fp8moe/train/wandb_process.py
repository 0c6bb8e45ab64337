"""The process beside rank 0 that talks to wandb (`train.wandb_run` starts it): a line of JSON a message on stdin.

First what `wandb.init` gets, then a record a step, last the summary. wandb works on a thread; this process reads on,
so that the run's pipe never fills while a server is slow. When stdin ends, wandb has so many seconds (the only
argument) to send what is left; then this process ends, and all that wandb started. One line on stdout says why wandb
logs no more.

A process of its own, and no thread of rank 0: wandb leaves functions that run at the end of its process, some of which
wait for the server (12 seconds where one accepts and never answers), and prints what the server said. Nothing that a
run needs is imported here: torch is not loaded.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

INIT_SECONDS = 60  # wandb's own limit for the server's first answer
MOST_WAITING = 20_000  # records that wait for a server before wandb is given up

Message = Mapping[str, Any] | None  # None: the run has ended


def main(finish_seconds: float) -> None:
    """Read messages until stdin ends, then end this process and those that wandb started."""
    waiting: queue.Queue[Message] = queue.Queue(MOST_WAITING)
    thread = threading.Thread(target=_send, args=(waiting,), daemon=True)
    thread.start()
    try:
        for line in sys.stdin:
            waiting.put_nowait(json.loads(line))
        waiting.put_nowait(None)
        thread.join(finish_seconds)
        if thread.is_alive():
            _say(f"the server needs over {finish_seconds:g} s at the end of the run")
    except queue.Full:
        _say(f"the server left {MOST_WAITING} steps without an answer")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # this process is the first of its group
    os._exit(0)


def _send(waiting: queue.Queue[Message]) -> None:
    try:
        _log_all(waiting)
    except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt too
        _say(" ".join(str(error).split())[:200] or type(error).__name__)


def _log_all(waiting: queue.Queue[Message]) -> None:
    import wandb

    first = waiting.get()
    if first is None:
        return
    settings = wandb.Settings(
        init_timeout=INIT_SECONDS, console="off", silent=True, disable_git=True, disable_code=True
    )
    run = wandb.init(**first, resume="allow", settings=settings)
    summary = None
    while (message := waiting.get()) is not None:
        if "summary" in message:
            summary = message["summary"]
        else:
            run.log(message["record"], step=message["step"])
    if summary is not None:
        run.summary.update(summary)
    run.finish(exit_code=1 if summary is None else 0)


def _say(reason: str) -> None:
    print(reason, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
