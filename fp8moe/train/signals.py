"""Signals that ask a run to end, taken whatever the main thread does: Python's own handlers wait for it.

The interpreter writes each signal's number to a socket, which `preempt` reads in a thread. Before a run is watched,
and for a launcher until it has started its workers, a signal ends the process at once. Nothing here loads torch: a
signal is taken from the first moment on.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

from fp8moe.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Signals:
    """Signals of this process, read from a socket that the interpreter writes to whatever the main thread does.

    end: reports an error and ends the process with its code; it does not return.
    """

    def __init__(self, end: Callable[[Exception], None]) -> None:
        self.end = end
        self.watched = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def read(self, seconds: float) -> list[signal.Signals]:
        """The signals of SIGNALS that came, waiting for the first up to `seconds`."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        return [signal.Signals(n) for n in (self._reader.recv(256) if ready else b"") if n in SIGNALS]

    def close(self) -> None:
        """Handle signals as before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            if handler is not None:  # not set by Python
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.watched:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self.end(PreemptedError(f"stopped by {signal.Signals(number).name} before the run began"))


_handled: list[Signals] = []


def handled_signals() -> Signals | None:
    """The signals that this process handles; None outside of `handling_signals`."""
    return _handled[-1] if _handled else None


@contextlib.contextmanager
def handling_signals(end: Callable[[Exception], None]) -> Iterator[None]:
    """Within the block a signal ends the process by `end`, with the state of a running run saved. Main thread."""
    _handled.append(Signals(end))
    try:
        yield
    finally:
        _handled.pop().close()
