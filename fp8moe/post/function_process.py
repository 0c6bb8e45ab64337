"""Functions of users in a process of their own: a call that takes too long ends that process, not the run.

Rewards have one a rank (`post.scoring`), verifiers one a thread (`post.verify.own`).

    begin(samples)      they are sent as the process takes them, a few ahead of its answers
    run(seconds)        what it answers is taken, for so long at most: ranks meet meanwhile
    a call is late      the process is killed with all that it started, the sample is not scored, another one goes on
    it ends itself      likewise: os._exit, a segmentation fault, memory that ran out

Refused: SIGALRM, whose handler waits until code that holds the interpreter's lock comes back, and that functions may
use themselves; a thread, which can't be ended; multiprocessing's pools, which import the main module anew and lose what
a process that dies had in work. The socket is never waited for without a bound, so a process that reads nothing is
found late as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.post.function_worker import KINDS, Answer, starting_words

logger = logging.getLogger(__name__)
STARTS = 300.0  # seconds in which its modules must be imported
ENDS = 5.0  # seconds that a killed process is waited for
AHEAD = 64  # samples that are sent before the first of them is answered


class FunctionProcess:
    """Calls functions on samples in order. found: of each sample, what the functions gave, up to and with the first
    that gave none: that one in words."""

    def __init__(self, kind: str, names: Sequence[str], timeout: float | None) -> None:
        """kind: reward or verifier. names: of functions, `module:function`. timeout: seconds of a call. Raises
        ConfigError where one can't be imported."""
        self._kind, self._names, self._timeout = kind, names, timeout
        self._setting, self._bound = KINDS[kind].setting, KINDS[kind].bound
        self._selector = selectors.DefaultSelector()
        self._samples: Sequence[Sequence[Any]] = ()
        self._at = 0
        self.found: list[list[Answer]] = []
        self._deadline = 0.0
        self._end: Callable[[], object] = lambda: None
        self._start()
        while not self._is_ready and self._problem is None:
            self._exchange_until(self._deadline)
        if self._problem is not None:
            self._end()
            raise ConfigError(self._problem)

    def begin(self, samples: Sequence[Sequence[Any]]) -> None:
        """Have the functions called on samples, each the arguments that its kind takes, which JSON can hold."""
        self._samples, self._at, self._next = samples, 0, 0
        self.found, self._has_said = [[] for _ in samples], False
        if self._problem is not None or self._has_ended():
            self._end()
            self._start()
        elif self._is_ready:
            self._deadline = self._of_a_call()

    def run(self, seconds: float) -> bool:
        """Go on for so many seconds at most; whether all samples are done."""
        until = time.monotonic() + seconds
        while self._at < len(self._samples):
            if self._problem is not None:
                for one in self.found[self._at :]:
                    one.append(f"can't be called: {self._problem}")
                self._at = len(self._samples)
                break
            self._exchange_until(min(until, self._deadline))
            if time.monotonic() >= until:
                break
        return self._at == len(self._samples)

    def close(self) -> None:
        """End the process and what it started, within ENDS."""
        self._end()

    def _start(self) -> None:
        self._is_ready, self._deadline = False, time.monotonic() + STARTS
        self._problem: str | None = None  # why there is no process
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    starting_words(self._kind, self._names, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # signals of the terminal are the run's; what it starts is killed with it
                    pass_fds=(theirs.fileno(),),
                )
        except OSError as error:
            ours.close()
            names = ", ".join(self._names)
            self._problem = (
                f"{self._setting}{names} need a process and none can be started ({error.strerror}): free memory"
            )
            return
        ours.setblocking(False)
        self._socket, self._received, self._unsent, self._next = ours, b"", b"", self._at
        self._selector.register(ours, selectors.EVENT_READ)
        self._end = weakref.finalize(self, _end, self._process, ours, self._selector, os.getpid())

    def _has_ended(self) -> bool:
        """Whether the process has, while nothing was in work."""
        try:
            return self._is_ready and not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _of_a_call(self) -> float:
        """When a call that begins now is late."""
        return time.monotonic() + (float("inf") if self._timeout is None else self._timeout)

    def _exchange_until(self, moment: float) -> None:
        """Send and take what can be, once; where nothing comes by then and a call is late, go on without it."""
        if not self._unsent and self._is_ready and self._next - self._at <= AHEAD // 2:
            more = self._samples[self._next : self._at + AHEAD]
            self._unsent = "".join(f"{json.dumps(one)}\n" for one in more).encode()
            self._next += len(more)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._socket, wanted)
        ready = self._selector.select(max(0.0, moment - time.monotonic()))
        events = ready[0][1] if ready else 0
        if events & selectors.EVENT_READ:
            try:
                self._take(self._socket.recv(1 << 16))
            except ConnectionError:
                self._take(b"")
        elif events:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except ConnectionError:  # it has ended, which is found when its last answers have been read
                self._unsent = b""
        elif time.monotonic() >= self._deadline:
            self._give_up(is_late=True)

    def _take(self, data: bytes) -> None:
        """Answers as they come; no data: the process has ended."""
        if not data:
            self._give_up(is_late=False)
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            value = json.loads(line)
            self._deadline = self._of_a_call()
            if not self._is_ready:
                self._is_ready, self._problem = value is None, value
                continue
            one = self.found[self._at]
            one.append(value)
            if isinstance(value, str) or len(one) == len(self._names):
                self._at += 1

    def _give_up(self, *, is_late: bool) -> None:
        """End the process. The sample in work is not scored, and another process goes on behind it."""
        self._end()
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        if not self._is_ready:
            names = ", ".join(self._names)
            says = f"are not imported after {STARTS:g} s" if is_late else f"end their process {how} when imported"
            self._problem = f"{self._setting}{names} {says}: name functions of modules that can be imported"
            return
        if self._at < len(self._samples):
            late, one = f"took longer than {self._bound}={self._timeout or 0:g} s", self.found[self._at]
            if is_late and not self._has_said and len(self._samples) > 1:  # now, since many such calls take long
                name = self._names[len(one)]
                logger.warning("the %s %s %s: its process is ended and started anew", self._kind, name, late)
                self._has_said = True
            one.append(late if is_late else f"ended its process {how}")
            self._at += 1
        self._start()


def _end(
    process: subprocess.Popen[bytes], channel: socket.socket, selector: selectors.BaseSelector, owner: int
) -> None:
    """Kill a process and its group, and wait for it a moment; in a fork of the run, leave it to the run."""
    with contextlib.suppress(KeyError, ValueError):
        selector.unregister(channel)
    channel.close()
    if os.getpid() != owner:
        return
    if process.returncode is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=ENDS)
