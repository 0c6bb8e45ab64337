"""Exponential moving average of the weights, on the host, taken beside the training.

    average <- average + (1 - decay) * (master - average)    in FP32, after an optimizer update; a skipped step has none

A rank averages the FP32 masters that it holds, whole parameters or pieces of them: nothing here knows which. The
average begins as the initial masters and not as zero, so it needs no bias correction.

Masters are copied to the host chunk by chunk, on a GPU by a stream of their own, and a thread averages one chunk while
the next is copied. The next optimizer step waits until the last chunk is copied (`wait_copied`), the next update of the
average until this one is done. On the host it takes 4 bytes a parameter held and two chunks (32 MiB), pinned where
masters are on a GPU. Refused: a copy of all masters, which would let the optimizer go on a little sooner, for 4 bytes a
parameter more; and averages on the GPU, 4 bytes a parameter of the memory that is short.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.limits import Range, check_fields

CHUNK = 1 << 22  # values that are copied at once


@dataclass(frozen=True)
class EmaConfig:
    """The average of the weights, on the host."""

    decay: float | None = None  # share of the average that an update keeps; None: no average
    every: int = 1  # optimizer updates between updates of the average

    def __post_init__(self) -> None:
        check_fields(
            self,
            "ema",
            decay=Range(above=0, below=1, use="use 0.999, or null for no average"),
            every=Range(least=1, use="use 1 for every update"),
        )

    def is_due(self, updates: int) -> bool:
        """Whether the average is updated after optimizer update number `updates` (from 1)."""
        return self.decay is not None and updates % self.every == 0


@dataclass(frozen=True)
class _Piece:
    """A run of values of one tensor, flat: of the average, of the master, and where the master's are copied to."""

    average: Tensor
    master: Tensor
    copied: Tensor


class Ema:
    """The average of `masters`: name -> tensor, FP32 and contiguous, all on one device, one value or more in all.

    Their values change from update to update; the tensors stay.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float, chunk: int = CHUNK) -> None:
        self.decay = decay
        self._masters = {name: master.detach() for name, master in masters.items()}
        self._averages = {name: master.to("cpu", copy=True) for name, master in self._masters.items()}
        self._device = next(iter(self._masters.values())).device
        halves = torch.empty(2, min(chunk, self.num_bytes // 4), pin_memory=self._device.type == "cuda")
        self._chunks = _chunks(self._averages, self._masters, halves)
        self._worker = ThreadPoolExecutor(1, "ema")
        self._update: Future[None] | None = None
        self._copied = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes of the average on this rank."""
        return 4 * sum(average.numel() for average in self._averages.values())

    def tensors(self) -> Mapping[str, Tensor]:
        """The average by name of its master, in its shape, when the update in flight is done; to be read or loaded."""
        self.wait()
        return self._averages

    def restart(self) -> None:
        """Begin again from the masters as they are."""
        for name, average in self.tensors().items():
            average.copy_(self._masters[name])

    def start_update(self) -> None:
        """Begin to average the masters as they are now. Raises what went wrong in the update before."""
        self.wait()
        self._copied.clear()
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._update = self._worker.submit(self._average, ready)

    def wait_copied(self) -> None:
        """Return when the masters may change."""
        if self._update is not None:
            self._copied.wait()

    def wait(self) -> None:
        """Wait for the update in flight. Raises what went wrong in it, at every call from then on."""
        if self._update is not None:
            self._update.result()

    def _average(self, ready: torch.cuda.Event | None) -> None:
        try:
            stream = None
            if ready is not None:
                stream = torch.cuda.Stream(self._device)
                stream.wait_event(ready)
            arrived = _copy(self._chunks[0], stream)
            for number, chunk in enumerate(self._chunks, 1):
                here, is_last = arrived, number == len(self._chunks)
                if not is_last:
                    arrived = _copy(self._chunks[number], stream)
                if here is not None:
                    here.synchronize()
                if is_last:
                    self._copied.set()
                for piece in chunk:
                    piece.average.lerp_(piece.copied, 1.0 - self.decay)
        finally:
            self._copied.set()


def _copy(chunk: list[_Piece], stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Copy the masters of a chunk; on a GPU, the event after which they are there."""
    if stream is None:
        for piece in chunk:
            piece.copied.copy_(piece.master)
        return None
    with torch.cuda.stream(stream):
        for piece in chunk:
            piece.copied.copy_(piece.master, non_blocking=True)
        return stream.record_event()


def _chunks(averages: Mapping[str, Tensor], masters: Mapping[str, Tensor], halves: Tensor) -> list[list[_Piece]]:
    """All values in chunks as large as one of the two `halves`, which consecutive chunks are copied to in turn."""
    chunks: list[list[_Piece]] = []
    size = used = halves.shape[1]
    for name, average in averages.items():
        flat, master, start = average.view(-1), masters[name].view(-1), 0
        while start < flat.numel():
            if used == size:
                chunks.append([])
                used = 0
            length = min(size - used, flat.numel() - start)
            of_tensor = slice(start, start + length)
            copied = halves[(len(chunks) - 1) % 2, used : used + length]
            chunks[-1].append(_Piece(flat[of_tensor], master[of_tensor], copied))
            start, used = start + length, used + length
    return chunks
