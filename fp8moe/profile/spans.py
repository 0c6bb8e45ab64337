"""Spans: named stretches of time, reported to listeners such as a step's stopwatch and the recorder of a trace.

Phases, actions, messages and waits give their names here and nothing else; without a listener a span costs a function
call. A span is named by what runs: "F attn", "B mlp", "W mlp" (a phase), "F2.7" (an action on stage 2, micro-batch 7),
"message dispatch" (on the communication thread), "wait dispatch", "wait RECV_F2.7<-rank 1" (by the phase in need).
Listeners belong to the process; spans come from its compute and its communication thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Listener(Protocol):
    """`began` may return anything, which is passed to the span's `ended`; both are called by the span's thread."""

    def began(self, name: str) -> Any: ...

    def ended(self, name: str, began: Any) -> None: ...


_exposed = [0.0]
_listeners: list[Listener] = []
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Report what runs in the block to all listeners as `name`."""
    return _reported(name, tuple(_listeners)) if _listeners else _NOTHING


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` is told of every span that begins."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def _reported(name: str, listeners: tuple[Listener, ...]) -> Iterator[None]:
    begun = [(listener, listener.began(name)) for listener in listeners]
    try:
        yield
    finally:
        for listener, began in reversed(begun):
            listener.ended(name, began)


@contextmanager
def waiting() -> Iterator[None]:
    """Count the time of the block as waiting for communication."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _exposed[0] += time.perf_counter() - start


def exposed_seconds() -> float:
    """Seconds this process has waited for communication since the last call (host time; on GPUs a lower bound)."""
    seconds, _exposed[0] = _exposed[0], 0.0
    return seconds
