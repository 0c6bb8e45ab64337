"""Who stayed away: each rank says once a second how far it is, and whoever waits in vain reads it and names the rank.

Neither gloo nor NCCL names the rank that a collective waited for. Each process therefore keeps, for every group, the
number and name of its last collective, and a thread writes that to the job's store once a second: one small write a
second a rank, whatever the number of collectives. (A write before each collective was refused: a step has thousands.)
When a collective fails, its caller looks twice, two beats apart: a rank of the group that is behind, or whose beat has
stopped, is missing; one that is behind because it waits for another leads on to that one. The error names rank, group
and collective; it is a `HangError`, logged where it is raised.

A rank that was stopped ends neither by itself nor by SIGTERM, and a launcher waits half a minute for it. Whoever found
one on its own machine therefore ends it, once its own sentence is left: `end_frozen`. A rank that is killed outright
leaves nothing, and its launcher ends the others before they can speak; a launcher that asks for it (NOTES) finds the
last collectives of each rank in a file, written as they start: one small write each.

NCCL's collectives don't fail where they are waited for: its own watchdog ends the process at the timeout. The beat
therefore also looks for a collective that has taken longer than `patience`, and logs the same sentence once, before.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.errors import LOST_PEER_PHRASES, HangError

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds
NOTES = "FP8MOE_WATCH_NOTES"  # the folder for `rank-N.json`, where a launcher has named one
_NOTE_BYTES = 4096  # a longer note is not cut, a shorter one covers what stood there
_SOURCE = re.compile(r"^\[[^]]*\] ")  # the file and line that gloo begins with


@dataclass
class _Watch:
    """This process's part: the store and, by group, the number, name and ranks of its last collective."""

    store: dist.Store
    rank: int
    notes: int | None  # file descriptor
    groups: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    silent: dict[int, dict[str, Any]] = field(default_factory=dict)  # processes whose beat has stopped, by rank
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    beat: int = 0
    process: dict[str, Any] = field(default_factory=lambda: _this_process())
    patience: float = float("inf")
    open: dict[int, Note] = field(default_factory=dict)  # by id: collectives that have not ended

    def beat_until_stopped(self) -> None:
        while not self.stopped.is_set():
            if not self.speak():
                return
            self.complain()
            self.stopped.wait(BEAT)

    def speak(self) -> bool:
        """Write where this process stands; False when the store has ended, and the job with it."""
        waits = [note.awaited for note in list(self.open.values()) if not note.has_ended()]
        try:
            with self.lock:
                self.beat += 1
                state = {"beat": self.beat, "groups": dict(self.groups), "process": self.process, "waits": waits}
                self.store.set(str(self.rank), json.dumps(state))
        except RuntimeError:
            return False
        return True

    def joins(self, group: str, name: str, ranks: str) -> int:
        """Note the next collective of `group`; its number."""
        number = self.groups.get(group, (0,))[0] + 1
        self.groups[group] = (number, name, ranks)
        if self.notes is not None:
            text = json.dumps({"last": group, "groups": dict(self.groups)})
            os.pwrite(self.notes, text.encode().ljust(_NOTE_BYTES), 0)
        return number

    def complain(self) -> None:
        """Log, once, the oldest collective that takes longer than `patience`, from a thread: the beat goes on."""
        for note in list(self.open.values()):
            if note.has_ended():
                self.open.pop(id(note), None)
            elif time.monotonic() - note.since > self.patience:
                self.open.clear()
                threading.Thread(target=note.complain, args=(self,), name="complaint", daemon=True).start()
                return

    def read(self, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
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
    notes = None
    if folder := os.environ.get(NOTES):
        notes = os.open(os.path.join(folder, f"rank-{dist.get_rank()}.json"), os.O_CREAT | os.O_WRONLY, 0o600)
    _current.append(_Watch(store, dist.get_rank(), notes))
    threading.Thread(target=_current[0].beat_until_stopped, name="watch", daemon=True).start()


def expect(seconds: float) -> None:
    """From now on say so when a collective takes longer than `seconds`; choose less than the groups' timeout."""
    if _current:
        _current[0].patience = seconds


def stop() -> None:
    """End the beat, before the process group is destroyed."""
    if _current:
        _current.pop().stopped.set()


def end_frozen() -> None:
    """Kill the processes of this machine that a failed collective found silent, if they are stopped by a signal."""
    if _current:
        host = _this_process()["host"]
        for rank, process in _current[0].silent.items():
            if process["host"] == host and _state(process["pid"]) == ("T", process["started"]):
                logger.error("rank %d, process %d, is stopped by a signal: it is killed", rank, process["pid"])
                os.kill(process["pid"], signal.SIGKILL)


def _this_process() -> dict[str, Any]:
    """What tells this process from any other, here and later: the machine's boot, its process namespace, the start."""
    if sys.platform != "linux":
        return {"host": None, "pid": os.getpid(), "started": None}
    host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "started": _state(os.getpid())[1]}


def _state(pid: int) -> tuple[str, str]:
    """A process's state (T: stopped) and when it started, as Linux says; "" where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class Note:
    """One collective of a group, or message of a link: a context around its start, and again around its wait."""

    def __init__(self, where: str, ranks: list[int], name: str) -> None:
        self._where, self._ranks, self._name, self._number = where, ranks, name, 0
        self.since = time.monotonic()
        self._done: torch.cuda.Event | None = None
        if _current:
            self._number = _current[0].joins(where, name, _listed(ranks))

    def __enter__(self) -> None:
        self.since = time.monotonic()
        if _current:
            _current[0].open[id(self)] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if torch.cuda.is_initialized():  # the device goes on with what the host has only enqueued
            self._done = torch.cuda.current_stream().record_event()
        elif _current and error is None:  # one that failed stays what this rank stood at, for others to read
            _current[0].open.pop(id(self), None)
        if isinstance(error, RuntimeError) and not isinstance(error, HangError) and _current:
            raise self._explained(_current[0], error) from error

    @property
    def awaited(self) -> tuple[str, int, list[int]]:
        """Where this process stands: group or link, number, ranks."""
        return self._where, self._number, self._ranks

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
        lost = any(words in text.lower() for words in LOST_PEER_PHRASES)
        watch.speak()  # whoever loses this rank next must find what it stood at
        # At once, before the look around takes its seconds: after a lost peer a launcher ends this process soon.
        logger.error("rank %d: %s failed (%s); who is missing follows", watch.rank, self._what(), text[:160])
        sentence = self._sentence(watch, f"failed ({text[:160]})")
        logger.error("rank %d: %s", watch.rank, sentence)
        return HangError(sentence, secondary=lost)

    def _sentence(self, watch: _Watch, what_happened: str) -> str:
        missing = missing_ranks(watch, self._where, self._number, self._ranks)
        return f"{missing}: {self._what()} {what_happened}"

    def _what(self) -> str:
        return f"{self._name}, number {self._number} of group {self._where} (ranks {_listed(self._ranks)})"


def collective(group: ProcessGroup, name: str) -> Note:
    """Note that this process joins the next collective of `group`."""
    return Note(group.group_desc, dist.get_process_group_ranks(group), name)


def message(group: ProcessGroup, source: int, target: int, name: str) -> Note:
    """Note that this process has begun to send, or receive, the next message from rank `source` to rank `target`."""
    return Note(f"{group.group_desc}, link {source} to {target}", [source, target], name)


def missing_ranks(watch: _Watch, group: str, number: int, ranks: list[int]) -> str:
    """Which of `ranks` have not come as far as collective `number` of `group`, or show no sign of life; in words.

    A rank that is missing because it waits for others itself, as along a pipeline, is asked for whom.
    """
    everyone = range(dist.get_world_size())
    try:
        before = watch.read(everyone)
        time.sleep(2 * BEAT + 0.5)
        after = watch.read(everyone)
    except RuntimeError as gone:
        return f"the rank that keeps the job's store has ended too ({str(gone).splitlines()[0][:80]})"
    ends: list[str] = []  # who waits for nobody
    between: list[str] = []
    seen = {watch.rank}
    questions = deque([(group, number, ranks)])
    while questions:
        group, number, ranks = questions.popleft()
        for rank in ranks:
            if rank in seen:
                continue
            if rank not in after:
                ends.append(f"rank {rank} has not started")
                continue
            state = after[rank]
            silent = state["beat"] == before.get(rank, {}).get("beat")
            done, last, _ = state["groups"].get(group, (0, "nothing", ""))
            if silent:
                watch.silent[rank] = state["process"]
            elif done >= number:
                continue
            seen.add(rank)
            questions.extend(state["waits"])
            stopped = f" and stopped after number {done} ({last})" if done < number else ""
            said = f"rank {rank} {'has ended or is frozen' if silent else 'is alive'}{stopped}"
            (between if _is_blocked(state["waits"], after) else ends).append(said)
    if ends and between:
        ends.append(f"between them and rank {watch.rank}: {', '.join(' '.join(said.split()[:2]) for said in between)}")
    return "; ".join(ends or between) or "no rank is behind"


def _is_blocked(waits: list[Any], states: dict[int, dict[str, Any]]) -> bool:
    """Whether somebody has not come to what is waited for; the last word of a rank that died may be of an old wait."""
    return any(
        states[rank]["groups"].get(where, (0,))[0] < number if rank in states else True
        for where, number, ranks in waits
        for rank in ranks
    )


def _listed(ranks: list[int]) -> str:
    steps = {b - a for a, b in itertools.pairwise(ranks)}
    return f"{ranks[0]}-{ranks[-1]}" if steps == {1} else ", ".join(map(str, ranks))
