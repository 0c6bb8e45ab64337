"""The process in which rewards of users run: `post.reward_process` starts it, and kills it when one takes too long.

It gets JSON lines, [problem's fields, text], by a socket, calls the functions in their order, and answers each call by
a line: the number, or in words why there is none, after which the sample's other functions are not called. The first
line says that the functions are imported, null, or why not. It imports neither torch nor anything of the run but
`Problem`, and has a session of its own: signals of the terminal do not reach it, and what a function starts can be
killed with it.

It ends with the run. A thread sees the socket close; a function that holds the interpreter's lock, such as a search by
a regular expression, would keep that thread waiting, so on Linux the kernel kills it with its parent as well. That
leaves programs that a function started alone: of them the thread would have killed all.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fp8moe.post.tasks import Problem

SET_PARENT_DEATH_SIGNAL = 1  # of prctl
OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers send them to all processes


def main() -> None:
    """Serve until the socket closes. Arguments: sys.path, which the starting line has set, then the names of the
    functions as JSON, the socket's descriptor, the parent's process id."""
    names, descriptor, parent = json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for one in OF_THE_RUN:
        signal.signal(one, lambda *_: None)  # and not SIG_IGN, which programs that a function starts would inherit
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    jobs: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, jobs), daemon=True).start()
    try:
        functions = [find(name) for name in names]
    except LookupError as error:
        _say(channel, str(error))
        return
    _say(channel, None)
    while True:
        *fields, text = jobs.get()
        problem = Problem(*fields)
        for function in functions:
            found = call(function, problem, text)
            _say(channel, found)
            if isinstance(found, str):
                break


def _read(channel: socket.socket, jobs: queue.SimpleQueue[list[str]]) -> None:
    """Put every job into the queue as it comes; at the end of the socket end this process and all of its group."""
    try:
        with channel.makefile("rb") as lines:
            for line in lines:
                jobs.put(json.loads(line))
    finally:
        os.killpg(0, signal.SIGKILL)


def _say(channel: socket.socket, value: float | str | None) -> None:
    channel.sendall(json.dumps(value).encode() + b"\n")


def find(name: str) -> Callable[[Problem, str], Any]:
    """The function `module:function`; modules of the working directory are found, as `python -m` finds them.

    Raises LookupError in words.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except BaseException as error:
        said = in_words(error)
        raise LookupError(f"grpo.rewards={name} can't be imported ({said}): name it module:function") from error
    if not callable(found):
        raise LookupError(f"grpo.rewards={name} is no function: name one that takes a problem and a text")
    reward: Callable[[Problem, str], Any] = found
    return reward


def call(function: Callable[[Problem, str], Any], problem: Problem, text: str) -> float | str:
    """The finite number that a function gives, or in words what it did instead."""
    try:
        value = float(function(problem, text))
    except BaseException as error:  # a function may raise SystemExit or KeyboardInterrupt by mistake, too
        return f"raised {in_words(error)}"
    return value if math.isfinite(value) else f"gave {value}"


def in_words(error: BaseException) -> str:
    """An error as one line, even where it can't say itself."""
    try:
        said = " ".join(str(error).split())
    except BaseException:
        said = "an error without words"
    return f"{type(error).__name__}: {said}"[:200]


def starting_words(names: Sequence[str], descriptor: int) -> list[str]:
    """The command line of the process. sys.path is the run's, so that modules are found as there."""
    paths = json.dumps([path for path in sys.path if isinstance(path, str)])
    script = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fp8moe.post import reward_worker as worker"
    command = [sys.executable, "-u", "-c", f"{script}; worker.main()", paths]
    return [*command, json.dumps(list(names)), str(descriptor), str(os.getpid())]
