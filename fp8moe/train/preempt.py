"""Preemption: SIGTERM, SIGUSR1, SIGHUP or a first SIGINT on any rank saves the run at one step on all ranks, exit 75.

A thread of each rank, not the training, takes the signals (Python's own handlers wait for the main thread, which may be
in a collective or a compiler) and passes the request to the other ranks through the job's store. Then

    the training finishes its step and stops before the next; a step, validation or compilation that takes longer than
    GRACE is abandoned
    the threads vote: each takes the lock that the training holds while it changes the state, and answers with the step
    of that state; only if all hold it at the same step do they save, else they let go and vote again
    each saves through the saver's own process group and ends its process; the training is never resumed

No rank can be past the update of a step before all ranks have reduced its gradients, so the steps of two ranks differ
by one for no longer than an update takes. Refused: an all-reduce of a flag in every step, as other trainers do. It
costs every step a collective, and is not reached from within a validation or a step longer than the time left.

Nothing here runs unless the command line has entered `handling_signals`: a library leaves signals alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from fp8moe.errors import EXIT, PreemptedError
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.signals import handled_signals

GRACE = 8.0  # seconds that the step in progress may still take
POLL = 0.25  # seconds between looks at the store
REPEATED = 1.0  # seconds after the request from which a SIGINT is a second one: a terminal and a launcher both send one
FAREWELL = 2.0  # seconds that a rank waits for the others, which would lose its last messages
INTERRUPTED = 128 + signal.SIGINT
_ASKED, _STOPPED = "asked", "stopped"

logger = logging.getLogger(__name__)


class Preemption:
    """What of a rank's run a signal may interrupt, and the thread that does it, within `handling_signals`."""

    def __init__(self) -> None:
        self._signals = handled_signals()
        self._changing = threading.RLock()
        self._store: dist.Store | None = None
        self._rank, self._world_size = 0, 1
        self._step: Callable[[], int] | None = None
        self._save: Callable[[], str] | None = None
        self._asked: tuple[float, str] | None = None  # when this rank learnt of it, and which signal
        self._is_waiting = self._is_ending = False
        self._done = threading.Event()
        self.on_end: list[Callable[[Exception], None]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take signals while the block runs."""
        if self._signals is None:
            yield
            return
        self._signals.watched = True
        thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            if self._is_ending:  # peers that have ended made this rank fail: the thread ends the process
                threading.Event().wait()
            raise
        finally:
            self._done.set()
        thread.join()

    def join(self, mesh: Mesh) -> None:
        """From now on the ranks of `mesh` are asked and stop together."""
        self._rank, self._world_size = mesh.rank, mesh.world_size
        if self._signals is not None and mesh.world_size > 1:
            # A connection of its own, as the hang detector's: the job's waits while the training does.
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore("fp8moe/preemption", store)

    def saves(self, step: Callable[[], int], save: Callable[[], str]) -> None:
        """From now on there is a state to save: of `step()`, by `save()`, which says what it did."""
        self._save, self._step = save, step

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The state changes within the block, and is not saved meanwhile; once it is being saved, wait for good."""
        with self._changing:
            yield

    def finish(self) -> None:
        """The run has come to its end: from now on nothing interrupts it. To be called within `changing`."""
        self._done.set()

    def stop_here(self) -> None:
        """Between two steps: wait for good if the run is to be saved."""
        if self._asked is not None:
            self._is_waiting = True
            threading.Event().wait()

    def _watch(self) -> None:
        vote = 0
        while not self._done.is_set():
            try:
                self._look(POLL)
                if self._asked is None or not self._is_time():
                    continue
                agreed = self._agree(vote)
                vote += 1
            except RuntimeError:  # the store has ended, and the job with it
                return
            if agreed:
                self._end()

    def _look(self, seconds: float) -> None:
        """Take what signals came within `seconds`, and what other ranks have been asked."""
        assert self._signals is not None
        for one in self._signals.read(seconds):
            if one is signal.SIGINT and self._asked is not None and time.monotonic() - self._asked[0] > REPEATED:
                os._exit(INTERRUPTED)
            if self._asked is None:
                self._asked = (time.monotonic(), one.name)
                logger.info("%s: the run is saved and ends", one.name)
                if self._store is not None:
                    self._store.set(_ASKED, one.name)
        if self._asked is None and self._store is not None and self._store.check([_ASKED]):
            self._asked = (time.monotonic(), self._store.get(_ASKED).decode())
        elif self._asked is not None and self._store is not None:
            self._store.set(_ASKED, self._asked[1])  # also what came before there was a store

    def _is_time(self) -> bool:
        """Whether to vote: with nothing to save at once, else when some rank's training has stopped, or after GRACE."""
        assert self._asked is not None
        if self._is_waiting and self._store is not None:
            self._store.set(_STOPPED, "1")
        stopped = self._is_waiting or (self._store is not None and self._store.check([_STOPPED]))
        return self._step is None or stopped or time.monotonic() - self._asked[0] > GRACE

    def _agree(self, vote: int) -> bool:
        """Whether all ranks hold their lock at the same step; if not, this one has let go of it."""
        held = self._changing.acquire(blocking=False)
        if held and self._done.is_set():
            self._changing.release()
            held = False
        if self._store is None:  # one process, or its peers are not known yet
            return held
        answer = "changing" if not held else "nothing" if self._step is None else str(self._step())
        self._store.set(f"{vote}/{self._rank}", answer)
        if self._rank == 0:
            answers = {self._await(f"{vote}/{rank}") for rank in range(self._world_size)}
            self._store.set(f"{vote}/all", "1" if len(answers) == 1 and "changing" not in answers else "0")
        agreed = self._await(f"{vote}/all") == "1"
        if held and not agreed:
            self._changing.release()
        return agreed

    def _await(self, key: str, seconds: float = float("inf")) -> str:
        """The value of a key that another rank sets, signals being taken meanwhile; "" if that is not in time."""
        assert self._store is not None
        deadline = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > deadline or self._done.is_set():
                return ""
            self._look(POLL / 10)
        return self._store.get(key).decode()

    def _end(self) -> None:
        """Save what there is to save and end the process."""
        assert self._signals is not None and self._asked is not None
        self._is_ending, name = True, self._asked[1]
        outcome: list[Exception] = []
        saving = threading.Thread(target=lambda: outcome.append(self._saved(name)), name="save", daemon=True)
        saving.start()
        while saving.is_alive():
            self._look(POLL)
        (error,) = outcome
        for finish in self.on_end:
            finish(error)
        with contextlib.suppress(RuntimeError):  # the store may end first
            if self._store is not None:
                if self._store.add("done", 1) == self._world_size:
                    self._store.set("all done", "1")
                self._await("all done", FAREWELL)
        self._signals.end(error)
        os._exit(EXIT["preempted"])

    def _saved(self, name: str) -> Exception:
        """Save; what ends the process."""
        try:
            return PreemptedError(f"stopped by {name}: {'nothing to save' if self._save is None else self._save()}")
        except Exception as error:
            return error
        except BaseException as error:  # torch's CheckpointException is no Exception
            return RuntimeError(str(error))
