"""Who stayed away: each rank says once a second how far it is, and whoever waits in vain reads it and names the rank.

Neither gloo nor NCCL names the rank that a collective waited for. Each process therefore keeps, for every group, the
number and name of its last collective, and a thread writes that to the job's store once a second: one small write a
second a rank, whatever the number of collectives. (A write before each collective was refused: a step has thousands.)
When a collective fails, its caller looks twice, two beats apart: a rank of the group that is behind, or whose beat has
stopped, is missing. The error names rank, group and collective; it is a `HangError`, logged where it is raised.

NCCL's collectives don't fail where they are waited for: its own watchdog ends the process at the timeout. The beat
therefore also looks for a collective that has taken longer than `patience`, and logs the same sentence once, before.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.errors import HangError

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds
_SOURCE = re.compile(r"^\[[^]]*\] ")  # the file and line that gloo begins with
_LOST = ("closed by peer", "reset by peer", "broken pipe", "socket closed", "remote peer")


@dataclass
class _Watch:
    """This process's part: the store and, by group, the number and name of its last collective."""

    store: dist.Store
    rank: int
    groups: dict[str, tuple[int, str]] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    patience: float = float("inf")
    open: dict[int, Note] = field(default_factory=dict)  # by id: collectives that have not ended

    def beat_until_stopped(self) -> None:
        beat = 0
        while not self.stopped.is_set():
            state = json.dumps({"beat": beat, "groups": dict(self.groups)})
            try:
                with self.lock:
                    self.store.set(str(self.rank), state)
            except RuntimeError:
                return  # the store has ended, and the job with it
            beat += 1
            self.complain()
            self.stopped.wait(BEAT)

    def complain(self) -> None:
        """Log, once, the oldest collective that takes longer than `patience`, from a thread: the beat goes on."""
        for note in list(self.open.values()):
            if note.has_ended():
                self.open.pop(id(note), None)
            elif time.monotonic() - note.since > self.patience:
                self.open.clear()
                threading.Thread(target=note.complain, args=(self,), name="complaint", daemon=True).start()
                return

    def read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """The last word of each of `ranks`; nothing for one that has not spoken."""
        with self.lock:
            return {r: json.loads(self.store.get(str(r))) for r in ranks if self.store.check([str(r)])}


_current: list[_Watch] = []
os.register_at_fork(after_in_child=_current.clear)  # a child inherits no threads


def start() -> None:
    """Begin to watch this process's collectives. torch.distributed must be up; a second call does nothing."""
    if _current:
        return
    # A connection of its own: a rank that waits on the job's store would otherwise stop its own beat.
    store = dist.PrefixStore("fp8moe/watch", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
    _current.append(_Watch(store, dist.get_rank()))
    threading.Thread(target=_current[0].beat_until_stopped, name="watch", daemon=True).start()


def expect(seconds: float) -> None:
    """From now on say so when a collective takes longer than `seconds`; choose less than the groups' timeout."""
    if _current:
        _current[0].patience = seconds


def stop() -> None:
    """End the beat, before the process group is destroyed."""
    if _current:
        _current.pop().stopped.set()


class Note:
    """One collective of a group, or message of a link: a context around its start, and again around its wait."""

    def __init__(self, where: str, ranks: list[int], name: str) -> None:
        self._where, self._ranks, self._name, self._number = where, ranks, name, 0
        self.since = time.monotonic()
        self._done: torch.cuda.Event | None = None
        if _current:
            groups = _current[0].groups
            self._number = groups.get(where, (0, ""))[0] + 1
            groups[where] = (self._number, name)

    def __enter__(self) -> None:
        self.since = time.monotonic()
        if _current:
            _current[0].open[id(self)] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if torch.cuda.is_initialized():  # the device goes on with what the host has only enqueued
            self._done = torch.cuda.current_stream().record_event()
        elif _current:
            _current[0].open.pop(id(self), None)
        if isinstance(error, RuntimeError) and not isinstance(error, HangError) and _current:
            raise self._explained(_current[0], error) from error

    def has_ended(self) -> bool:
        """Whether the device is through; without one, a collective that has ended is not asked."""
        return self._done is not None and self._done.query()

    def complain(self, watch: _Watch) -> None:
        """Say who is missing in a collective that takes too long, if it still does when that is known."""
        sentence = self._sentence(watch, f"has not ended for {time.monotonic() - self.since:.0f} s")
        if not self.has_ended():
            logger.error("rank %d: %s", watch.rank, sentence)

    def _explained(self, watch: _Watch, error: RuntimeError) -> HangError:
        text = _SOURCE.sub("", " ".join(str(error).split()))
        lost = any(words in text.lower() for words in _LOST)
        # At once, before the look around takes its seconds: after a lost peer a launcher ends this process soon.
        logger.error("rank %d: %s failed (%s); who is missing follows", watch.rank, self._what(), text[:160])
        sentence = self._sentence(watch, f"failed ({text[:160]})")
        logger.error("rank %d: %s", watch.rank, sentence)
        return HangError(sentence, secondary=lost)

    def _sentence(self, watch: _Watch, what_happened: str) -> str:
        missing = missing_ranks(watch, self._where, self._number, self._ranks)
        return f"{missing}: {self._what()} {what_happened}"

    def _what(self) -> str:
        return f"{self._name}, number {self._number} of {self._where} (ranks {_listed(self._ranks)})"


def collective(group: ProcessGroup, name: str) -> Note:
    """Note that this process joins the next collective of `group`."""
    return Note(f"group {group.group_desc}", dist.get_process_group_ranks(group), name)


def message(group: ProcessGroup, source: int, target: int, name: str) -> Note:
    """Note that this process has begun to send, or receive, the next message from rank `source` to rank `target`."""
    return Note(f"link {source} to {target} of group {group.group_desc}", [source, target], name)


def missing_ranks(watch: _Watch, group: str, number: int, ranks: list[int]) -> str:
    """Which of `ranks` have not come as far as collective `number` of `group`, or show no sign of life; in words."""
    try:
        before = watch.read(ranks)
        time.sleep(2 * BEAT + 0.5)
        after = watch.read(ranks)
    except RuntimeError as gone:
        return f"the rank that keeps the job's store has ended too ({str(gone).splitlines()[0][:80]})"
    words = []
    for rank in ranks:
        if rank == watch.rank:
            continue
        if rank not in after:
            words.append(f"rank {rank} has not started")
            continue
        state = after[rank]
        silent = state["beat"] == before.get(rank, {}).get("beat")
        done, last = state["groups"].get(group, (0, "nothing"))
        if done < number:
            life = "has ended or is frozen" if silent else "is alive"
            words.append(f"rank {rank} {life} and stopped after number {done} ({last})")
        elif silent:
            words.append(f"rank {rank} has ended or is frozen")
    return "; ".join(words) or "no rank is behind"


def _listed(ranks: list[int]) -> str:
    steps = {b - a for a, b in itertools.pairwise(ranks)}
    return f"{ranks[0]}-{ranks[-1]}" if steps == {1} else ", ".join(map(str, ranks))
