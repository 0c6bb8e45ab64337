"""Streams of messages, which run beside compute, first in, first out; one for each kind of message.

`start` gives a handle at once; the handle owns the message's buffers until it is waited for, and `wait()` is counted as
exposed communication. Every rank must issue a group's collectives in one order, which one queue gives: a thread pool
was refused. A single asynchronous collective would not do either, because a message has several stages: the second hop
starts when the first has arrived, rows are sent when counts are known.

On a CPU a thread runs them (`HostStream`): gloo's collectives and compute leave Python's lock free for each other. On a
GPU a message is a few launches on a CUDA stream of its own (`device_stream`), and whoever starts it launches them.

GEMMs that run one program an SM leave SMs to a message while it is in flight, from its start to its wait in the order
of the caller's launches: `leaving_sms` says how many they may take (`kernels.backend.limit_sms`).

What a message raises is raised by its `wait()`, and by every later one's: ranks are out of step from there on, and a
message after the first failed one would only hang.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fp8moe.kernels.backend import limit_sms
from fp8moe.profile.spans import COMMUNICATION, span, waiting

Value = TypeVar("Value")
Result = TypeVar("Result")


class Pending(Generic[Value, Result]):
    """A message in flight; `finish` turns what arrived into the result, on the thread and stream that waits."""

    def __init__(
        self,
        message: Callable[[], Value],
        finish: Callable[[Value], Result],
        name: str,
        issue: Callable[[Any], None] | None = None,
    ) -> None:
        self.name = name
        self._issue = issue  # runs the message, and those before it, if nothing has
        self.future: Future[tuple[Value, Any]] = Future()
        self._message: Callable[[], Value] | None = message  # owns the buffers
        self._finish: Callable[[Value], Result] | None = finish
        self._result: Any = None

    def call(self) -> Value:
        """Run the message; its stream does."""
        assert self._message is not None
        return self._message()

    def arrived(self) -> Value:
        """What arrived, without `finish`; for a later message of the stream, where it needs no wait."""
        return self.future.result()[0]

    def has(self, quality: Callable[[Value], bool]) -> bool:
        """Whether it has run and what arrived has a quality; one that failed has any."""
        return self.future.done() and (self.future.exception() is not None or quality(self.arrived()))

    def wait(self) -> Result:
        """The result, as often as it is asked for; raises what the message raised."""
        if self._finish is not None:
            with span(f"wait {self.name}"), waiting(), _counted_until_waited(self):
                if self._issue is not None:
                    self._issue(self)
                value, done = self.future.result()
                if done is not None:
                    torch.cuda.current_stream().wait_event(done)
            if done is not None:
                for tensor in tensors_of(value):
                    tensor.record_stream(torch.cuda.current_stream())
            self._result = self._finish(value)
            self._message = self._finish = None
            self.future = Future()  # lets go of what arrived
        return self._result


class Stream(ABC):
    """First in, first out."""

    def start(
        self,
        message: Callable[[], Value],
        finish: Callable[[Value], Result],
        name: str = "message",
        *,
        takes_sms: bool = True,
        ready: Callable[[], bool] | None = None,
    ) -> Pending[Value, Result]:
        """Queue `message`, called `name`; on a GPU it begins after what the caller's stream has been given so far.

        takes_sms: GEMMs leave SMs to it until it is waited for; not for one so small that nobody waits for it itself.
        ready: on a GPU, whether it runs without the host's waiting for the device; None: always. Asked when all before
        it ran.
        """
        pending = Pending(message, finish, name, self._issue)
        if takes_sms:
            _count(pending)
        self._put(pending, ready)
        return pending

    @abstractmethod
    def _put(self, pending: Pending[Any, Any], ready: Callable[[], bool] | None) -> None:
        """Take a message."""

    @abstractmethod
    def _issue(self, wanted: Pending[Any, Any]) -> None:
        """Somebody waits for a message: run it, and those before it, if nothing else does."""


class HostStream(Stream):
    """The CPU's: a daemon thread, so that a hung message can't keep a failed process alive."""

    def __init__(self, name: str = COMMUNICATION) -> None:
        self._queue: queue.SimpleQueue[Pending[Any, Any]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _put(self, pending: Pending[Any, Any], ready: Callable[[], bool] | None) -> None:
        self._queue.put(pending)

    def _issue(self, wanted: Pending[Any, Any]) -> None:
        """The thread runs all of them."""

    def _work(self) -> None:
        with torch.no_grad():
            while True:
                self._step(self._queue.get())

    def _step(self, pending: Pending[Any, Any]) -> None:
        try:
            if self._error is not None:
                raise self._error
            with span(f"message {pending.name}"):
                value = pending.call()
            pending.future.set_result((value, None))
        except BaseException as error:
            self._error = error
            pending.future.set_exception(error)


_sms: list[int] = []  # for GEMMs beside messages, while `leaving_sms` is in force
_in_flight: set[Pending[Any, Any]] = set()


@contextmanager
def leaving_sms(count: int | None) -> Iterator[None]:
    """Within the block GEMMs take at most `count` SMs while a message is in flight; None: always all."""
    if count is None:
        yield
        return
    _sms.append(count)
    try:
        yield
    finally:
        _sms.clear()
        _in_flight.clear()
        limit_sms(None)


def _count(pending: Pending[Any, Any]) -> None:
    if _sms:
        _in_flight.add(pending)
        limit_sms(_sms[-1])


@contextmanager
def _counted_until_waited(pending: Pending[Any, Any]) -> Iterator[None]:
    """The block waits for the message; after it the message is no longer in flight, however the block ends."""
    try:
        yield
    finally:
        if pending in _in_flight:
            _in_flight.discard(pending)
            limit_sms(_sms[-1] if _in_flight else None)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, or those in its items or fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
