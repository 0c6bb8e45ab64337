"""Two takers of one stale lock: exactly one wins, however they race."""

from __future__ import annotations

import json
import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

from fp8moe.errors import ConfigError
from fp8moe.parallel.hang import this_process
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


def test_one_of_two_takers_of_a_stale_lock_wins(tmp_path: Path) -> None:
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
