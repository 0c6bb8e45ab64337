"""Saving in the background: the copy is the state of the start, training goes on, what goes wrong surfaces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.errors import NonFiniteError, SpaceError
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, Saver
from fp8moe.train.checkpoint import saver as module
from fp8moe.train.checkpoint.hashed_file import HashedFile
from fp8moe.train.checkpoint.pieces import Pieces
from tests.parallel.ranks import run_ranks

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


@pytest.mark.parametrize("background", [True, False])
def test_a_state_that_is_not_finite_is_refused_and_deletes_nothing(tmp_path: Path, background: bool) -> None:
    saver, state = (
        Saver(tmp_path, CheckpointConfig(keep=1, background=background), is_first=True, group=None),
        torch.ones(4),
    )
    saver.start(1, "{}", of(state))
    saver.wait()
    assert saver.finished() == [tmp_path / "step-1"] and saver.newest == 1
    state[2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^master is not finite on rank 0 after step 2$") as caught:
        saver.start(2, "{}", of(state))
        saver.wait()
    assert caught.value.exit_code == 5 and saver.newest is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    state[2] = 1.0
    saver.start(3, "{}", of(state))
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-3"] and not saver.is_refused


def test_the_copy_is_looked_through_beside_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on once the copy is made, may change the state, and is told by a call that all ranks make."""
    looking, here, state = threading.Event(), threading.get_ident(), torch.tensor([1.0, float("inf")])
    look = module.not_finite

    def slow(tensors: Mapping[str, Sequence[Tensor]]) -> list[str]:
        assert threading.get_ident() != here, "the training looks"
        assert looking.wait(20)
        return look(tensors)

    monkeypatch.setattr(module, "not_finite", slow)
    saver = saver_at(tmp_path)
    saver.start(1, "{}", of(state))
    saver.wait_copied()
    state.fill_(1.0)
    assert not saver.is_refused
    looking.set()
    assert saver._thread is not None
    saver._thread.join(20)
    assert saver.is_refused and saver.finished() == [], "ranks would learn of it at different steps"
    with pytest.raises(NonFiniteError, match=r"^master is not finite"):
        saver.start(2, "{}", of(state))
    assert not saver.is_refused and not list(tmp_path.iterdir())
    saver.start(2, "{}", of(state))
    saver.close()
    assert saver.finished() == [tmp_path / "step-2"]


def _one_of_two(root: Path, background: bool) -> tuple[str, list[str]]:
    rank, state = dist.get_rank(), torch.ones(4)
    group = dist.new_group(backend="gloo")
    config = CheckpointConfig(keep=1, background=background)
    saver = Saver(root, config, is_first=rank == 0, group=group)
    saver.start(1, "{}", lambda hold: {"part": Pieces(8, ((4 * rank, hold(state)),))})
    saver.wait()
    state[3] = float("nan") if rank == 1 else 2.0
    with pytest.raises(NonFiniteError) as caught:
        saver.start(2, "{}", lambda hold: {"part": Pieces(8, ((4 * rank, hold(state)),)), "same": torch.ones(2)})
        saver.wait()
    dist.barrier(group)
    return str(caught.value), sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("background", [True, False])
def test_all_ranks_refuse_what_one_has_found(tmp_path: Path, background: bool) -> None:
    found = run_ranks(_one_of_two, 2, tmp_path, background)
    assert found == [("part is not finite on rank 1 after step 2", ["latest", "step-1"])] * 2
