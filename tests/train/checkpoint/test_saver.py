"""Saving in the background: the copy is the state of the start, training goes on, what goes wrong surfaces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8moe.errors import SpaceError
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, Saver
from fp8moe.train.checkpoint import saver as module
from fp8moe.train.checkpoint.hashed_file import HashedFile

Hold = Callable[[Tensor], Tensor]


def saver_at(root: Path, **settings: object) -> Saver:
    return Saver(root, CheckpointConfig(keep=9, **settings), is_first=True, group=None)


def of(state: Tensor) -> Callable[[Hold], Mapping[str, Tensor]]:
    return lambda hold: {"master": hold(state)}


def loaded(path: Path) -> Tensor:
    back = {"master": torch.full((4,), float("nan"))}
    checkpoint.load(path, back)
    return back["master"]


def test_it_holds_the_state_of_its_start_and_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    copying, writing = threading.Event(), threading.Event()
    saver, state = saver_at(tmp_path), torch.zeros(4)
    save = module.save

    def slow_copy(hold: Hold) -> Mapping[str, Tensor]:
        assert copying.wait(20)
        return {"master": hold(state)}

    def slow_save(*args, **kwargs) -> Path:
        assert writing.wait(20)
        return save(*args, **kwargs)

    monkeypatch.setattr(module, "save", slow_save)
    saver.start(1, "{}", slow_copy)
    optimizer = threading.Thread(target=lambda: (saver.wait_copied(), state.fill_(7)))
    optimizer.start()
    optimizer.join(0.2)
    assert optimizer.is_alive() and not state.any(), "the optimizer waits for the copy"
    copying.set()
    optimizer.join(20)
    assert torch.equal(state, torch.full((4,), 7.0)), "and not for the writing"
    assert saver.finished() == [] and not checkpoint.complete(tmp_path)
    writing.set()
    saver.wait()
    assert saver.finished() == [tmp_path / "step-1"] and saver.finished() == []
    assert torch.equal(loaded(tmp_path / "step-1"), torch.zeros(4))


def test_one_is_in_flight(tmp_path: Path) -> None:
    saver, state = saver_at(tmp_path), torch.zeros(4)
    for step in range(1, 6):
        saver.start(step, "{}", of(state))
        saver.wait_copied()
        state += 1
    saver.wait()
    assert saver.finished() == [tmp_path / f"step-{step}" for step in range(1, 6)]
    for step in range(1, 6):
        assert torch.equal(loaded(tmp_path / f"step-{step}"), torch.full((4,), step - 1.0))


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fails_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch, background: bool) -> None:
    saver, state = saver_at(tmp_path, background=background), torch.zeros(4)
    saver.start(1, "{}", of(state))
    saver.wait()

    def full(self, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(
        SpaceError, match=r"step-2 can't be written \(.*No space left on device.*\): free space or name"
    ):
        saver.start(2, "{}", of(state))
        saver.wait()
    monkeypatch.undo()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-1"]
    assert (tmp_path / "latest").read_text() == "step-1\n"
    saver.start(3, "{}", of(state))
    saver.wait()
    assert (tmp_path / "latest").read_text() == "step-3\n"


def test_an_error_surfaces_at_the_next_step(tmp_path: Path) -> None:
    saver = saver_at(tmp_path)

    def broken(hold: Hold) -> Mapping[str, Tensor]:
        raise ValueError("no such tensor")

    saver.start(1, "{}", broken)
    saver.wait_copied()  # a copy that failed must not stop the optimizer for ever
    while saver._thread is not None and saver._thread.is_alive():
        saver._thread.join(20)
    with pytest.raises(ValueError, match="no such tensor"):
        saver.finished()
    assert saver.finished() == [], "it is raised once"
