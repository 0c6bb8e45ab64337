"""Hang detector: each rank publishes its last collective every second; if one fails, its caller names who is missing.

Neither gloo nor NCCL names the rank that a collective waited for. Each process therefore keeps, for every group, the
number and name of its last collective, and a thread writes them to the job's store once a second, the heartbeat: one
small write a second and rank, whatever the number of collectives. (A write before each collective was refused: a step
has thousands.) When a collective fails, its caller reads the store twice, two heartbeats apart: a rank of the group
that is behind, or whose heartbeat has stopped, is missing; a rank that is behind because it waits for another one leads
to that one. The error names rank, group and collective; it is a `HangError`, logged where it is raised. The store is a
process itself, rank 0's or the launcher's: frozen, it answers nothing for good, so whoever reports waits STORE_SECONDS
for it, and its silence is the report.

A rank that was stopped by a signal does not end on SIGTERM, and a launcher waits half a minute for it. A rank that has
found one on its own machine kills it once its own error is reported: `end_frozen`. A rank that is killed outright
writes nothing more, and its launcher ends the others before they can report; where the launcher asks for it (NOTES),
each rank also writes its last collectives to a file as they start, one small write each.

NCCL's collectives do not fail where they are waited for: NCCL's own watchdog ends the process at the timeout. The
heartbeat's thread therefore also looks for a collective that has taken longer than `report_after` allows, and logs the
same sentence once, before that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fp8moe.errors import LOST_PEER_PHRASES, HangError
from fp8moe.parallel.place import process_state, rank_in_words, this_process

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

HEARTBEAT = 1.0  # seconds
STORE_SECONDS = 5.0  # that a report waits for the store
NOTES = "FP8MOE_HANG_NOTES"  # environment variable: the folder for `rank-N.json`, where a launcher wants them
_NOTE_BYTES = 4096  # shorter notes are padded to this, so that each overwrites the last
_SOURCE = re.compile(r"^\[[^]]*\] ")  # the file and line that gloo's messages begin with


@dataclass
class _Detector:
    """This process's hang detector: the store and, by group, the number, name and ranks of its last collective."""

    store: dist.Store
    rank: int
    notes: int | None  # file descriptor
    groups: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    silent: dict[int, dict[str, Any]] = field(default_factory=dict)  # processes whose heartbeat has stopped, by rank
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    heartbeat: int = 0
    process: dict[str, Any] = field(default_factory=lambda: this_process())
    report_after: float = float("inf")  # seconds
    pending: dict[int, PendingCollective] = field(default_factory=dict)  # by id: collectives that have not ended

    def run(self) -> None:
        """Publish and report until stopped."""
        while not self.stopped.is_set():
            if not self.publish():
                return
            self.report_overdue()
            self.stopped.wait(HEARTBEAT)

    def publish(self) -> bool:
        """Write this process's last collectives to the store; False when the store has ended, and the job with it."""
        waits = [one.awaited for one in list(self.pending.values()) if not one.has_ended()]
        try:
            with self.lock:
                self.heartbeat += 1
                state = {"heartbeat": self.heartbeat, "groups": dict(self.groups), "process": self.process}
                self.store.set(str(self.rank), json.dumps({**state, "waits": waits}))
        except RuntimeError:
            return False
        return True

    def record(self, group: str, name: str, ranks: str) -> int:
        """Count the next collective of `group` -> its number."""
        number = self.groups.get(group, (0,))[0] + 1
        self.groups[group] = (number, name, ranks)
        if self.notes is not None:
            text = json.dumps({"last": group, "groups": dict(self.groups)})
            os.pwrite(self.notes, text.encode().ljust(_NOTE_BYTES), 0)
        return number

    def report_overdue(self) -> None:
        """Log, once and from another thread, the oldest collective that takes longer than `report_after`."""
        for one in list(self.pending.values()):
            if one.has_ended():
                self.pending.pop(id(one), None)
            elif time.monotonic() - one.since > self.report_after:
                self.pending.clear()
                threading.Thread(target=one.report, args=(self,), name="hang report", daemon=True).start()
                return

    def read(self, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """What each of `ranks` published last; nothing for one that has published nothing."""
        with self.lock:
            return {r: json.loads(self.store.get(str(r))) for r in ranks if self.store.check([str(r)])}


_current: list[_Detector] = []
os.register_at_fork(after_in_child=_current.clear)  # a child inherits no threads


def start() -> None:
    """Start this process's hang detector. torch.distributed must be up; a second call does nothing."""
    if _current:
        return
    # A connection of its own: a rank that waits on the job's store would otherwise stop its own heartbeat.
    store = dist.PrefixStore("fp8moe/hang", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
    notes = None
    if folder := os.environ.get(NOTES):
        notes = os.open(os.path.join(folder, f"rank-{dist.get_rank()}.json"), os.O_CREAT | os.O_WRONLY, 0o600)
    _current.append(_Detector(store, dist.get_rank(), notes))
    threading.Thread(target=_current[0].run, name="hang detector", daemon=True).start()


def report_after(seconds: float) -> None:
    """From now on log a collective that takes longer than `seconds`; choose less than the groups' timeout."""
    if _current:
        _current[0].report_after = seconds


def stop() -> None:
    """End the heartbeat, before the process group is destroyed."""
    if _current:
        _current.pop().stopped.set()


def end_frozen() -> None:
    """Kill the processes of this machine that a failed collective found silent, where a signal has stopped them."""
    if _current:
        host = this_process()["host"]
        for rank, process in _current[0].silent.items():
            if process["host"] == host and process_state(process["pid"]) == ("T", process["started"]):
                logger.error(
                    "%s, process %d, was stopped by a signal and is killed", rank_in_words(rank), process["pid"]
                )
                os.kill(process["pid"], signal.SIGKILL)


class PendingCollective:
    """A collective of a group, or a message of a link, reported to the detector: a context around start and wait."""

    def __init__(self, where: str, ranks: list[int], name: str) -> None:
        self._where, self._ranks, self._name, self._number = where, ranks, name, 0
        self.since = time.monotonic()
        self._done: torch.cuda.Event | None = None
        if _current:
            self._number = _current[0].record(where, name, _listed(ranks))

    def __enter__(self) -> None:
        self.since = time.monotonic()
        if _current:
            _current[0].pending[id(self)] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if torch.cuda.is_initialized():  # the device goes on with what the host has only enqueued
            self._done = torch.cuda.current_stream().record_event()
        elif _current and error is None:  # a failed one stays, for other ranks to read what this one waited for
            _current[0].pending.pop(id(self), None)
        if isinstance(error, RuntimeError) and not isinstance(error, HangError) and _current:
            raise self._explained(_current[0], error) from error

    @property
    def awaited(self) -> tuple[str, int, list[int]]:
        """What this process waits for: group or link, number, ranks."""
        return self._where, self._number, self._ranks

    def has_ended(self) -> bool:
        """Whether the device is done with it; without a device, one that has ended is never asked."""
        return self._done is not None and self._done.query()

    def report(self, detector: _Detector) -> None:
        """Log who is missing in a collective that takes too long, unless it has ended meanwhile."""
        sentence = self._sentence(detector, f"has not ended for {time.monotonic() - self.since:.0f} s")
        if not self.has_ended():
            logger.error("%s: %s", rank_in_words(detector.rank), sentence)

    def _explained(self, detector: _Detector, error: RuntimeError) -> HangError:
        text = _SOURCE.sub("", " ".join(str(error).split()))
        lost = any(words in text.lower() for words in LOST_PEER_PHRASES)
        with contextlib.suppress(RuntimeError):
            asked(detector.publish, STORE_SECONDS)  # a rank that loses this one next must find what it waited for
        # At once, before reading the store takes its seconds: after a lost peer a launcher ends this process soon.
        me = rank_in_words(detector.rank)
        logger.error("%s: %s failed (%s); who is missing follows", me, self._what(), text[:160])
        sentence = self._sentence(detector, f"failed ({text[:160]})")
        logger.error("%s: %s", me, sentence)
        return HangError(sentence, secondary=lost)

    def _sentence(self, detector: _Detector, what_happened: str) -> str:
        missing = missing_ranks(detector, self._where, self._number, self._ranks)
        return f"{missing}: {self._what()} {what_happened}"

    def _what(self) -> str:
        return f"{self._name}, number {self._number} of group {self._where} (ranks {_listed(self._ranks)})"


def collective(group: ProcessGroup, name: str) -> PendingCollective:
    """Report that this process joins the next collective of `group`."""
    return PendingCollective(group.group_desc, dist.get_process_group_ranks(group), name)


def message(group: ProcessGroup, source: int, target: int, name: str) -> PendingCollective:
    """Report that this process has started to send, or receive, the next message from rank `source` to `target`."""
    return PendingCollective(f"{group.group_desc}, link {source} to {target}", [source, target], name)


def missing_ranks(detector: _Detector, group: str, number: int, ranks: list[int]) -> str:
    """In words, which of `ranks` have not joined collective `number` of `group`, or have stopped publishing.

    A rank that is missing because it waits itself, as along a pipeline, leads to the ranks that it waits for.
    """
    everyone = range(dist.get_world_size())
    try:
        before = asked(lambda: detector.read(everyone), STORE_SECONDS)
        time.sleep(2 * HEARTBEAT + 0.5)
        after = asked(lambda: detector.read(everyone), STORE_SECONDS)
    except RuntimeError as gone:
        keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        return f"{keeper}, which keeps the job's store, has ended or is frozen ({str(gone).splitlines()[0][:80]})"
    ends: list[str] = []  # missing, and waiting for nobody
    between: list[int] = []  # missing, and waiting for another rank
    behind: list[str] = []  # the same in words
    seen = {detector.rank}
    questions = deque([(group, number, ranks)])
    while questions:
        group, number, ranks = questions.popleft()
        for rank in ranks:
            if rank in seen:
                continue
            if rank not in after:
                seen.add(rank)
                ends.append(f"{rank_in_words(rank)} has not started")
                continue
            state = after[rank]
            silent = state["heartbeat"] == before.get(rank, {}).get("heartbeat")
            done, last, _ = state["groups"].get(group, (0, "nothing", ""))
            if silent:
                detector.silent[rank] = state["process"]
            elif done >= number:
                continue
            seen.add(rank)
            questions.extend(state["waits"])
            stopped = f" and stopped after number {done} ({last})" if done < number else ""
            said = f"{rank_in_words(rank)} {'has ended or is frozen' if silent else 'is alive'}{stopped}"
            if _is_blocked(state["waits"], after):
                between.append(rank)
                behind.append(said)
            else:
                ends.append(said)
    if ends and between:
        names = ", ".join(map(rank_in_words, between))
        ends.append(f"between them and {rank_in_words(detector.rank)}: {names}")
    return "; ".join(ends or behind) or "no rank is behind"


def _is_blocked(waits: list[Any], states: dict[int, dict[str, Any]]) -> bool:
    """Whether a rank has not joined what is waited for; what a dead rank published last may be an old wait."""
    return any(
        states[rank]["groups"].get(where, (0,))[0] < number if rank in states else True
        for where, number, ranks in waits
        for rank in ranks
    )


def _listed(ranks: list[int]) -> str:
    steps = {b - a for a, b in itertools.pairwise(ranks)}
    return f"{ranks[0]}-{ranks[-1]}" if steps == {1} else ", ".join(map(str, ranks))


def asked(question: Callable[[], Answer], seconds: float) -> Answer:
    """What `question` to the store gives; its calls wait for good on a process that is frozen.

    It is asked on a thread that is left behind after `seconds`. RuntimeError then, or as it raises it.
    """
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="question to the store", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
