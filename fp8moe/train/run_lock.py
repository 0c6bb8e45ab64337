"""Lock of a run directory: the file `lock` of rank 0, so that two runs never write one directory.

It holds the host, process and start time of its owner, and its modification time is the owner's heartbeat. On the same
machine the owner is alive while a process of that number and start time is. Another machine's is watched: it is alive
if the heartbeat moves within STALE seconds. (Comparing the heartbeat with this machine's clock was refused: clocks of
machines differ, and so may the file server's. So was `flock`: not every shared file system passes it on.) The lock of a
dead owner is renamed and made anew, which one of several takers does first; a lock that moved meanwhile is put back. A
third taker may have made its own in between, so whoever took over looks again after RECHECK seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.parallel.place import process_state, this_process

LOCK_FILE = "lock"
HEARTBEAT = 5.0  # seconds
RECHECK = 1.0  # seconds after which all who take over a dead owner's lock have moved what they move
STALE = 30.0  # seconds without a heartbeat after which an owner on another machine counts as dead

logger = logging.getLogger(__name__)
_held: dict[Path, threading.Event] = {}  # by run directory: what ends the heartbeat


def acquire(run_dir: Path) -> None:
    """Lock `run_dir` for this process. Raises ConfigError where another run that is alive has it; OSError."""
    path = run_dir / LOCK_FILE
    mine = {**this_process(), "name": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    taking_over = False
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _take_over(path)
            taking_over = True
            continue
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(mine) + "\n")
        if taking_over:
            time.sleep(RECHECK)
        if not taking_over or _owner(path) == mine:
            break
    _held[run_dir] = threading.Event()
    threading.Thread(target=_beat, args=(path, _held[run_dir]), name="run lock", daemon=True).start()


def release(run_dir: Path) -> None:
    """Remove this process's lock; nothing where it has none."""
    if run_dir in _held:
        _held.pop(run_dir).set()
        with contextlib.suppress(OSError):
            (run_dir / LOCK_FILE).unlink()


@contextlib.contextmanager
def released(run_dir: Path) -> Iterator[None]:
    """Remove this process's lock at the end of the block, if it has one."""
    try:
        yield
    finally:
        release(run_dir)


def check_unlocked(run_dir: Path) -> None:
    """Raise ConfigError where a live process of this machine has the lock; another machine's is not watched here."""
    owner = _owner(run_dir / LOCK_FILE)
    if owner is not None and _is_here(owner) and _lives(owner):
        raise _refusal(run_dir, owner)


def _take_over(path: Path) -> None:
    """Remove the lock of a dead owner, and say so. Raises ConfigError where it is alive."""
    owner = _owner(path)
    if owner is None:
        return
    if _lives(owner) if _is_here(owner) else _beats(path):
        if not owner:
            return  # its owner has written it by now
        raise _refusal(path.parent, owner)
    stale = path.with_name(f"{LOCK_FILE}.{os.getpid()}")
    try:
        path.rename(stale)
    except FileNotFoundError:  # another taker was first
        return
    if _owner(stale) != owner:  # another taker was first, and this is its lock
        with contextlib.suppress(FileExistsError):
            os.link(stale, path)
    else:
        text = "%s was locked by process %s on %s, which has ended: the lock is taken over"
        logger.warning(text, path.parent, owner.get("pid"), owner.get("name"))
        print(text % (path.parent, owner.get("pid"), owner.get("name")), flush=True)
    stale.unlink()


def _owner(path: Path) -> Mapping[str, Any] | None:
    """What the lock holds; nothing in it where its owner died, or is, between making and writing it; None: no lock."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _is_here(owner: Mapping[str, Any]) -> bool:
    return owner.get("host") is not None and owner["host"] == this_process()["host"]


def _lives(owner: Mapping[str, Any]) -> bool:
    state, started = process_state(owner["pid"])
    return state not in ("", "Z", "X") and started == owner["started"]


def _beats(path: Path) -> bool:
    """Whether the lock's heartbeat moves, or its owner changes, within STALE seconds."""
    before, deadline = _moved(path), time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE / 10))
        if (now := _moved(path)) != before:
            return now is not None
    return False


def _moved(path: Path) -> tuple[int, int] | None:
    """When the heartbeat moved last, of which file; opened, since NFS looks at the server's file only then."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _refusal(run_dir: Path, owner: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"run_dir={run_dir} belongs to a run that is alive: process {owner.get('pid')} on {owner.get('name')}, since "
        f"{owner.get('since')}: stop that run first, or use another run_dir"
    )
