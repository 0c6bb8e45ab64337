"""The process in which functions of users run, rewards and verifiers: `post.function_process` starts it, and kills it
when one takes too long.

It gets JSON lines, a list of arguments each, by a socket, calls the functions in their order, and answers each call by
a line: what the function gave, or in words why that is nothing, after which the sample's other functions are not
called. The first line says that the functions are imported, null, or why not. It imports neither torch nor anything of
the run but `Problem` and `Verdict`, and has a session of its own: signals of the terminal do not reach it, and what a
function starts can be killed with it.

It ends with the run. A thread sees the socket close; a function that holds the interpreter's lock, such as a search by
a regular expression, would keep that thread waiting, so on Linux the kernel kills it as well, with the thread that
started it. That leaves programs that a function started alone: of them the thread would have killed all.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8moe.post.tasks import Problem
from fp8moe.post.verify.verdict import Verdict

Function = Callable[..., Any]
Answer = float | list[Any] | str  # str: in words why there is none
SET_PARENT_DEATH_SIGNAL = 1  # of prctl
OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers send them to all processes


@dataclass(frozen=True)
class Kind:
    """What functions of users are. setting: the words before a name where it is typed. bound: the setting of the time.
    takes: of what, in words. call: one of them with the arguments of a line."""

    setting: str
    bound: str
    takes: str
    call: Callable[..., Answer]


def reward_arguments(problem: Problem, text: str) -> list[str]:
    """Of the reward of a text, as a line has them."""
    return [problem.prompt, problem.solution, problem.answer, problem.place, text]


def call_reward(function: Function, *arguments: str) -> Answer:
    """The finite number that it gives."""
    *fields, text = arguments
    value = float(function(Problem(*fields), text))
    return value if math.isfinite(value) else f"gave {value}"


def call_verifier(function: Function, text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Answer:
    """The fields of the Verdict that it gives; a plain bool is a verdict too."""
    found = function(text, row, **options)
    if isinstance(found, bool):
        found = Verdict(found)
    if not isinstance(found, Verdict):
        return f"returned {type(found).__name__} and no Verdict"
    return [bool(found.ok), str(found.reason), bool(found.raised)]


KINDS = {
    "reward": Kind("grpo.rewards=", "grpo.reward_timeout", "a problem and a text", call_reward),
    "verifier": Kind("--verify ", "--verify-timeout", "a text and a row", call_verifier),
}


def main() -> None:
    """Serve until the socket closes. Arguments: sys.path, which the starting line has set, then the kind of the
    functions and their names as JSON, the socket's descriptor, the parent's process id."""
    kind, names = KINDS[sys.argv[2]], json.loads(sys.argv[3])
    descriptor, parent = int(sys.argv[4]), int(sys.argv[5])
    for one in OF_THE_RUN:
        signal.signal(one, lambda *_: None)  # and not SIG_IGN, which programs that a function starts would inherit
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    jobs: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, jobs), daemon=True).start()
    try:
        functions = [find(kind, name) for name in names]
    except LookupError as error:
        _say(channel, str(error))
        return
    _say(channel, None)
    while True:
        arguments = jobs.get()
        for function in functions:
            found = call(kind, function, arguments)
            _say(channel, found)
            if isinstance(found, str):
                break


def _read(channel: socket.socket, jobs: queue.SimpleQueue[list[Any]]) -> None:
    """Put every job into the queue as it comes; at the end of the socket end this process and all of its group."""
    try:
        with channel.makefile("rb") as lines:
            for line in lines:
                jobs.put(json.loads(line))
    finally:
        os.killpg(0, signal.SIGKILL)


def _say(channel: socket.socket, value: Answer | None) -> None:
    channel.sendall(json.dumps(value).encode() + b"\n")


def find(kind: Kind, name: str) -> Function:
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
        raise LookupError(f"{kind.setting}{name} can't be imported ({said}): name it module:function") from error
    if not callable(found):
        raise LookupError(f"{kind.setting}{name} is no function: name one that takes {kind.takes}")
    named: Function = found
    return named


def call(kind: Kind, function: Function, arguments: Sequence[Any]) -> Answer:
    """What a function gives, or in words what it did instead."""
    try:
        return kind.call(function, *arguments)
    except BaseException as error:  # a function may raise SystemExit or KeyboardInterrupt by mistake, too
        return f"raised {in_words(error)}"


def in_words(error: BaseException) -> str:
    """An error as one line, even where it can't say itself."""
    try:
        said = " ".join(str(error).split())
    except BaseException:
        said = "an error without words"
    return f"{type(error).__name__}: {said}"[:200]


def starting_words(kind: str, names: Sequence[str], descriptor: int) -> list[str]:
    """The command line of the process. sys.path is the run's, so that modules are found as there."""
    paths = json.dumps([path for path in sys.path if isinstance(path, str)])
    script = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fp8moe.post import function_worker as worker"
    )
    command = [sys.executable, "-u", "-c", f"{script}; worker.main()", paths]
    return [*command, kind, json.dumps(list(names)), str(descriptor), str(os.getpid())]
