"""A save that ends anywhere, killed or refused by its disk, leaves a checkpoint to go on from; the next one cleans up.

Every operation on a file is interrupted in turn, before it and, where it takes a while, in its middle.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.errors import DataError, SpaceError
from fp8moe.parallel.mesh import build_mesh
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, RunState, location
from fp8moe.train.checkpoint.files import LocalFolder
from fp8moe.train.checkpoint.hashed_file import HashedFile
from fp8moe.train.checkpoint.remote import RemoteFolder
from tests.train.checkpoint.store import full_of, url_of

MODEL = compose([]).config.model
OPERATIONS: list[tuple[Any, str]] = [
    *((HashedFile, name) for name in ("write", "close")),
    *((LocalFolder, name) for name in ("create", "remove", "make", "remove_itself", "sync")),
    *((RemoteFolder, name) for name in ("create", "remove", "make", "remove_itself")),
    *((Path, name) for name in ("rename", "replace")),
]


class Killed(BaseException):
    """The process ends here; without a message, as some errors are."""


class Interruption:
    """Raises `error` at the `at`-th operation, in its middle where `midway`; `reached`: whether there were so many.

    A process that is killed does nothing afterwards: every later operation is refused as well. A disk that refuses one
    operation may do the next.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException, *, midway: bool) -> None:
        self._at, self._error, self._midway, self._count, self.reached = at, error, midway, itertools.count(), False
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, operation: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(this: Any, *args: Any) -> Any:
            number = next(self._count)
            if number == self._at:
                self.reached = True
                if self._midway and name == "write":
                    operation(this, bytes(args[0])[: len(args[0]) // 2])
                elif self._midway and name in ("rename", "replace", "remove", "close"):
                    operation(this, *args)  # it was done, and nothing after it
                raise self._error
            if number > self._at and isinstance(self._error, Killed):
                raise self._error
            return operation(this, *args)

        return watched


def save(root: checkpoint.Location, step: int, keep: int = 1) -> None:
    state = RunState(step=step, updates=step, consumed=8 * step, skipped=0, seed=3, seq_len=32)
    text = checkpoint.state_text(state, MODEL, {})
    kept = CheckpointConfig(keep=keep)
    checkpoint.save(root, step, text, full_of(step), kept=kept, is_first=True, group=None)


def gone_on_from(root: checkpoint.Location, run_dir: Path) -> int:
    """The step that a run would go on from; its bytes and its tensors are right."""
    mesh = build_mesh(1, 1, 1, timeout=timedelta(seconds=60))
    chosen = checkpoint.choose("auto", run_dir, str(root), MODEL, mesh, seed=3, seq_len=32, optimizer="adamw")
    assert chosen is not None
    path, state = chosen
    back = full_of(float("nan"))
    checkpoint.load(path, back)
    assert torch.equal(back["master"], torch.full((4,), float(state.step)))
    return state.step


CASES = {  # (behind a URL, midway, step 3 was there already, the error)
    "kill": (False, False, False, Killed()),
    "kill midway, again": (False, True, True, Killed()),
    "full, again": (False, False, True, OSError(errno.ENOSPC, "No space left on device")),
    "url, kill, again": (True, False, True, Killed()),
    "url, kill midway": (True, True, False, Killed()),
    "url, refused": (True, False, False, OSError(errno.EACCES, "Forbidden")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_good_checkpoint_is_always_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """again: step 3 was there already, damaged, and the run went on from step 2."""
    remote, midway, again, error = CASES[case]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # its time; that it is called, test_folder shows
    for step in (1, 2, 3) if again else (1, 2):
        save(tmp_path / "before", step, keep=3)
    if again:
        (tmp_path / "before" / "step-3" / "rank-0.safetensors").write_bytes(b"damaged")
    steps: set[int] = set()
    for at in itertools.count():
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", folder)
        root = location(url_of(folder) if remote else str(folder))
        with pytest.MonkeyPatch.context() as patch:
            interruption = Interruption(patch, at, error, midway=midway)
            try:
                save(root, 3)
            except (Killed, DataError, SpaceError) as raised:
                assert isinstance(error, Killed) or str(error.args[1]) in str(raised)
        steps.add(step := gone_on_from(root, tmp_path / "nowhere"))
        assert step in (2, 3)
        latest = (folder / "latest").read_text()
        assert latest in ("step-2\n", "step-3\n")
        if not again and step == 2:
            assert latest == "step-2\n", "it moves when the new one is complete"
        if step == 2:
            assert {"step-1", "step-2"} <= {path.name for path in checkpoint.complete(folder)}, "nor is one deleted"
        save(root, 3)
        assert gone_on_from(root, tmp_path / "nowhere") == 3
        left = {path.name for path in folder.iterdir() if path.is_file() or any(path.iterdir())}
        assert left - {"latest.tmp"} == {"step-3", "latest"}, (at, left)
        if not interruption.reached:
            break
    assert at > 15 and steps == {2, 3}, "it was interrupted both before and after the checkpoint was complete"
