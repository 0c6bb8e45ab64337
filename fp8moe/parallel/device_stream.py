"""A GPU's stream of messages: whoever starts one launches it, on a CUDA stream of its own, which events order.

A thread was refused: Python runs one thread at a time, and a thread that wants to launch beside one that launches all
the time gets its turn only when that one waits, while both are slowed down by asking. A message whose sizes the host
must first read from the device stays in the queue, with those behind it, until they are there: whoever starts or waits
for a message looks. So the host waits for the device where it needs what has not arrived, and nowhere else, and on
every rank messages are launched in the order in which they were started.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from fp8moe.parallel.stream import HostStream, Pending, Stream
from fp8moe.profile.spans import COMMUNICATION, acting_as, span


class DeviceStream(Stream):
    """A GPU's: its queue holds what the host does not know enough of yet, and what stands behind."""

    def __init__(self, device: torch.device, name: str = COMMUNICATION) -> None:
        self._queue: deque[tuple[Pending[Any, Any], torch.cuda.Event, Callable[[], bool] | None]] = deque()
        self._device, self._name = device, name
        # Layers wait for messages to experts: what they launch goes first to an SM that becomes free.
        self._cuda = torch.cuda.Stream(device, -1 if name == COMMUNICATION else 0)
        self._error: BaseException | None = None

    def _put(self, pending: Pending[Any, Any], ready: Callable[[], bool] | None) -> None:
        self._queue.append((pending, torch.cuda.current_stream(self._device).record_event(), ready))
        self._issue()

    def _issue(self, wanted: Pending[Any, Any] | None = None) -> None:
        """Launch what is queued up to `wanted`, and behind it up to the first that is not ready."""
        is_queued = any(pending is wanted for pending, *_ in self._queue)
        while self._queue:
            pending, begun, ready = self._queue[0]
            if not is_queued and ready is not None and not ready():
                return
            self._queue.popleft()
            self._run(pending, begun)
            is_queued = is_queued and pending is not wanted

    def _run(self, pending: Pending[Any, Any], begun: torch.cuda.Event) -> None:
        try:
            if self._error is not None:
                raise self._error
            with torch.no_grad(), torch.cuda.stream(self._cuda):
                self._cuda.wait_event(begun)
                with acting_as(self._name), span(f"message {pending.name}"):
                    value = pending.call()
                done = self._cuda.record_event()
            pending.future.set_result((value, done))
        except BaseException as error:
            self._error = error
            pending.future.set_exception(error)
            if not isinstance(error, Exception):  # Ctrl-C is the caller's
                raise


_streams: dict[tuple[torch.device, str], Stream] = {}
os.register_at_fork(after_in_child=_streams.clear)  # a child inherits no threads


def communication_stream(device: torch.device, name: str = COMMUNICATION) -> Stream:
    """The stream of this process for `device` by name: COMMUNICATION carries tokens to experts, REPLICAS gradients and
    weights between replicas, which take long and must not stand in front of tokens."""
    if (device, name) not in _streams:
        _streams[device, name] = DeviceStream(device, name) if device.type == "cuda" else HostStream(name)
    return _streams[device, name]
