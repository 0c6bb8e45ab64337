"""Saves checkpoints beside the training: copies while the next forward and backward run, writes while training goes on.

`start` returns at once. A thread copies the state to the host; the optimizer waits for that copy (`wait_copied`), since
until it the state does not change. Then the thread writes, in a process group of its own, so that its collectives never
meet the training's. One checkpoint is in flight: the next start waits for it. What went wrong in the thread is raised
by the next call, on every rank, because the write itself is collective; under `on_failure=continue` a disk that refuses
is reported instead, and raised by `close` if the newest checkpoint failed.

Before anything is written the copy is looked through for numbers that are not finite, and the ranks tell each other: if
one has found any, all refuse it, and what was saved before stays. All ranks must go back at the same step, and their
threads end at different times. So `finished` does not raise NonFiniteError: each step tells all ranks whether a
checkpoint `is_refused` on one, and what all call at the same step raises it, `start`, `wait` or `close`. Looking before
the copy was refused: training would wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.errors import DataError, NonFiniteError, SpaceError
from fp8moe.train.checkpoint.config import CheckpointConfig
from fp8moe.train.checkpoint.folder import save
from fp8moe.train.checkpoint.location import Location
from fp8moe.train.checkpoint.pieces import Pieces
from fp8moe.train.finite_state import described, not_finite

Hold = Callable[[Tensor], Tensor]
Tensors = Mapping[str, Tensor | Pieces]


class Saver:
    """Writes a run's checkpoints below `root`, in the background where `config` says so.

    group: of all ranks, on the host, used for nothing else; None for one process.
    """

    def __init__(
        self, root: Location, config: CheckpointConfig, *, is_first: bool, group: dist.ProcessGroup | None
    ) -> None:
        import fp8moe.train.checkpoint.torch_checkpoint  # noqa: F401, now, and not while the first checkpoint is written

        self.root, self._config, self._is_first, self.group = root, config, is_first, group
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._finished: list[Location] = []
        self.newest: int | None = None  # the step of the last one that was started
        self._failures: list[DataError | SpaceError] = []
        self._newest_failed: DataError | SpaceError | None = None

    def start(
        self, step: int, state: str, tensors: Callable[[Hold], Tensors], ready: torch.cuda.Event | None = None
    ) -> None:
        """Save the run's state as it is now; tensors(hold) gives all of them, each passed through `hold`.

        ready: on a GPU, when the state was as it is now, where work that does not end may have been enqueued since.
        Raises NonFiniteError, where training waits for the save, and what went wrong with the checkpoint before.
        """
        self.wait()
        self.newest = step
        if not self._config.background and ready is None:
            self._save(step, state, tensors(lambda tensor: tensor))
            return
        self._copied.clear()
        if ready is None and torch.cuda.is_available():
            ready = torch.cuda.Event()
            ready.record()
        self._thread = threading.Thread(target=self._run, args=(step, state, tensors, ready), daemon=True)
        self._thread.start()

    def wait_copied(self) -> None:
        """Return when the state may change: the copy in flight, if there is one, is done."""
        if self._thread is not None:
            self._copied.wait()

    @property
    def is_refused(self) -> bool:
        """Whether the last checkpoint was not written since its state is not finite; the next `wait` raises it."""
        return isinstance(self._error, NonFiniteError)

    def finished(self) -> list[Location]:
        """Checkpoints completed since the last call. Raises what went wrong in the background, save NonFiniteError."""
        if self._thread is not None and not self._thread.is_alive() and not self.is_refused:
            self.wait()
        paths, self._finished = self._finished, []
        return paths

    def failures(self) -> list[DataError | SpaceError]:
        """What went wrong since the last call, under `on_failure=continue`."""
        errors, self._failures = self._failures, []
        return errors

    def close(self) -> None:
        """Wait for the checkpoint in flight. Raises what went wrong with the newest."""
        self.wait()
        if self._newest_failed is not None:
            raise self._newest_failed

    def wait(self) -> None:
        """Wait for the checkpoint in flight. Raises what went wrong."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, state: str, tensors: Callable[[Hold], Tensors], ready: torch.cuda.Event | None) -> None:
        try:
            try:
                copies = _copied(tensors, ready)
            finally:
                self._copied.set()
            self._save(step, state, copies)
        except BaseException as error:
            self._error = error

    def _save(self, step: int, state: str, tensors: Tensors) -> None:
        kept, first, group = self._config, self._is_first, self.group
        self._check_finite(step, tensors)
        try:
            path = save(self.root, step, state, tensors, kept=kept, is_first=first, group=group)
        except (DataError, SpaceError) as error:
            if kept.on_failure == "stop":
                raise
            self.newest, self._newest_failed = None, error
            self._failures.append(error)
        else:
            self._newest_failed = None
            self._finished.append(path)  # the list is looked up afterwards: `finished` may have taken the one before

    def _check_finite(self, step: int, tensors: Tensors) -> None:
        """Raise NonFiniteError, on every rank, where a tensor of one is not finite. Collective over the group."""
        parts = {
            name: [values for _, values in one.ranges] if isinstance(one, Pieces) else [one]
            for name, one in tensors.items()
        }
        of_ranks = [not_finite(parts)]
        if self.group is not None:
            mine, of_ranks = of_ranks[0], of_ranks * self.group.size()
            dist.all_gather_object(of_ranks, mine, group=self.group)
        if wrong := described(of_ranks):
            self.newest = None
            raise NonFiniteError(f"{wrong} after step {step}")


def _copied(tensors: Callable[[Hold], Tensors], ready: torch.cuda.Event | None) -> Tensors:
    """Copies on the host of what `tensors` gives; on a GPU by a stream of their own, beside the compute."""

    def hold(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    if ready is None:
        return tensors(hold)
    stream = torch.cuda.Stream(ready.device)  # a thread's own current device is the first one
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return tensors(hold)
