"""Two takers of one stale lock: exactly one wins, however they race."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from fp8moe.errors import ConfigError
from fp8moe.parallel.place import process_state, this_process
from fp8moe.train import run_lock
from fp8moe.train.run_lock import LOCK_FILE, acquire, release

ROUNDS = 100


def _ended() -> dict[str, object]:
    """A lock's owner of this machine that has ended."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writer, json.dumps(this_process()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return dict(json.loads(os.read(reader, 4096))) | {"name": "here", "since": "then"}


def _take(folders: list[Path], name: str, together: Barrier) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for folder in folders:
        together.wait(20)
        try:
            acquire(folder)
            (folder / f"won by {name}").touch()
        except ConfigError as error:
            (folder / f"refused {name}").write_text(str(error))
        together.wait(20)
        if (folder / f"won by {name}").exists():
            assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
        together.wait(20)
        release(folder)
    os._exit(0)


def test_one_of_two_takers_of_a_stale_lock_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RECHECK", 0.01)
    owner, folders = _ended(), [tmp_path / str(number) for number in range(ROUNDS)]
    for folder in folders:
        folder.mkdir()
        (folder / LOCK_FILE).write_text(json.dumps(owner))
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    takers = [context.Process(target=_take, args=(folders, name, together), daemon=True) for name in "ab"]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
        taker.kill()
    assert [taker.exitcode for taker in takers] == [0, 0]
    for folder in folders:
        found = sorted(path.name.split()[0] for path in folder.iterdir())
        assert found == ["refused", "won"], (folder, found)
        assert "belongs to a run that is alive" in next(folder.glob("refused*")).read_text()


def test_who_took_over_a_stale_lock_and_lost_it_to_a_third_taker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second taker moves the first one's new lock away, a third makes its own before it is put back."""
    monkeypatch.setattr(run_lock, "RECHECK", 1.0)
    lock, parent = tmp_path / LOCK_FILE, os.getppid()
    third = {**this_process(), "pid": parent, "started": process_state(parent)[1], "name": "third", "since": "now"}
    lock.write_text(json.dumps(_ended()))

    def take_between() -> None:
        deadline = time.monotonic() + 10
        while not (lock.exists() and f'"pid": {os.getpid()}' in lock.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        lock.rename(tmp_path / "moved away")
        lock.write_text(json.dumps(third))

    taker = threading.Thread(target=take_between)
    taker.start()
    with pytest.raises(ConfigError, match=f"alive: process {parent} on third"):
        acquire(tmp_path)
    taker.join()
    assert json.loads(lock.read_text())["name"] == "third"
