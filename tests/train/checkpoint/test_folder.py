"""Checkpoint folders: when one is saved, that it is whole before it has its name, which ones stay, which are found."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fp8moe.cli.compose import compose, keys_of
from fp8moe.errors import ConfigError, DataError
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.model.config import ModelConfig
from fp8moe.train import checkpoint
from fp8moe.train.checkpoint import CheckpointConfig, RunState, torch_checkpoint
from tests.model.shapes import changed

BASE = compose([]).config.model


def save(root: Path, step: int, keep: int = 9, value: float = 0.0, keep_every: int = 0) -> Path:
    """A checkpoint of one tensor after `step` steps, written by one process."""
    state = RunState(step=step, updates=step, consumed=8 * step, skipped=1, seed=3, seq_len=32)
    tensors = {"master": torch.full((4,), value)}
    text = checkpoint.state_text(state, BASE, {})
    kept = CheckpointConfig(keep=keep, keep_every=keep_every)
    return checkpoint.save(root, step, text, tensors, kept=kept, is_first=True, group=None)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        *((ValueError("many\nthe last line\n"), "the last line"), (KeyError(), "KeyError")),
        *((OSError(errno.EIO, "broken disk"), "broken disk"), (OSError("the store is gone"), "the store is gone")),
    ],
)
def test_what_failed_on_another_rank_is_said(
    cause: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise torch_checkpoint.CheckpointException("save", {3: (cause, None)})  # type: ignore[dict-item]

    monkeypatch.setattr(torch_checkpoint, "write", write)
    with pytest.raises(DataError, match=rf"step-1 can't be written \(rank 3: {said}\): free space or name"):
        save(tmp_path, 1)
    assert checkpoint.find("auto", tmp_path) is None


@pytest.mark.parametrize(
    ("every", "at_end", "due"),
    [
        *((0, True, [6]), (0, False, []), (1, False, [1, 2, 3, 4, 5, 6]), (2, False, [2, 4, 6])),
        *((4, False, [4]), (4, True, [4, 6]), (5, True, [5, 6]), (7, False, [])),
    ],
)
def test_is_due(every: int, at_end: bool, due: list[int]) -> None:
    config = CheckpointConfig(every=every, at_end=at_end)
    assert [step for step in range(1, 7) if config.is_due(step, 6)] == due


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.every=-1 must be at least 0"):
        CheckpointConfig(every=-1)
    with pytest.raises(ValueError, match=r"checkpoint.keep=0 must be at least 1: use 1"):
        CheckpointConfig(keep=0)
    CheckpointConfig(every=0, keep=1)


def test_the_oldest_go_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-8", "step-9", "step-10"]
    (tmp_path / "step-12.tmp").mkdir()  # half written
    (tmp_path / "notes-1").mkdir()
    save(tmp_path, 11, keep=3)
    left = {"step-9", "step-10", "step-11", "step-12.tmp", "notes-1", "latest"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert (tmp_path / "latest").read_text() == "step-11\n"
    save(tmp_path, 12, keep=1, keep_every=5)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-10", "step-12"]
    save(tmp_path, 100, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-100"]
    assert checkpoint.complete(tmp_path / "nowhere") == []


def test_later_ones_that_were_passed_over_count_for_nothing(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    save(tmp_path, 3, keep=1)  # 4 and 6 are damaged: the run went on from 2
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-3", "step-4", "step-6"]
    save(tmp_path, 5, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-4", "step-5", "step-6"]


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (9, 10):
        save(root, step)
    assert checkpoint.find("auto", tmp_path) == root / "step-10" == checkpoint.find(str(tmp_path), None)
    assert checkpoint.find(str(root / "step-9"), tmp_path) == root / "step-9"
    assert checkpoint.find("none", tmp_path) is None and checkpoint.find("auto", None) is None
    shutil.copytree(root / "step-10", root / "step-11")
    (root / "step-11" / "manifest.json").unlink()
    assert checkpoint.find("auto", tmp_path) == root / "step-10"
    with pytest.raises(ConfigError, match=r"step-11 holds no complete checkpoint: name a run directory"):
        checkpoint.find(str(root / "step-11"), None)
    (root / "step-11" / ".metadata").touch()
    with pytest.raises(ConfigError, match=r"is a checkpoint of format 2 or earlier, without a manifest.json, and this"):
        checkpoint.find(str(root / "step-11"), None)


def test_every_byte_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int | str] = []  # the inode of each file that was synchronized; the new name of a rename
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def recording_fsync(descriptor: int) -> None:
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recording_rename(path: Path, target: Path) -> Path:
        calls.append(Path(target).name)
        return rename(path, target)

    def recording_replace(path: Path, target: Path) -> Path:
        calls.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    monkeypatch.setattr(Path, "rename", recording_rename)
    final = save(tmp_path, 3)
    files = list(final.iterdir())
    assert {path.name for path in files} == {"state.json", "index.json", "manifest.json", "rank-0.safetensors"}
    before = calls[: calls.index("step-3")]
    assert {path.stat().st_ino for path in (*files, final)} <= set(before), "files, and their names in the folder"
    root, named = tmp_path.stat().st_ino, calls.index("step-3")
    assert root in calls[named : calls.index("latest")], "its own name, before latest moves"
    assert root in calls[calls.index("latest") :]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 2, value=1.0)
    (tmp_path / "step-2.tmp").mkdir()
    (tmp_path / "step-2.tmp" / "left").touch()
    path = save(tmp_path, 2, value=2.0)
    assert not (path / "left").exists() and {entry.name for entry in tmp_path.iterdir()} == {"step-2", "latest"}
    tensors = {"master": torch.full((4,), float("nan"))}
    checkpoint.load(path, tensors)
    assert torch.equal(tensors["master"], torch.full((4,), 2.0))
    state = checkpoint.read_state(path, BASE, seed=3, seq_len=32)
    assert state == RunState(step=2, updates=2, consumed=16, skipped=1, seed=3, seq_len=32)


def test_only_free_fields_may_differ(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert set(keys_of(ModelConfig)) >= checkpoint.FREE_FIELDS
    free = {"force_balance": True, "aux_loss_alpha": 0.5, "bias_gamma": 0.5, "mtp_weight": 0.5, "init_std": 0.5,
            "max_seq_len": 2 * BASE.max_seq_len, "backend": "flash"}  # fmt: skip
    checkpoint.read_state(path, changed(BASE, **free), seed=3, seq_len=32)
    heads = BASE.attention.num_heads
    other = changed(BASE, num_heads=2 * heads, topk=1, norm_eps=0.5, **free)
    with pytest.raises(ConfigError) as caught:
        checkpoint.read_state(path, other, seed=3, seq_len=32)
    assert str(caught.value) == (
        f"{path} is a checkpoint of another model: model.attention.num_heads={heads} there and {2 * heads} here, "
        f"and 2 more model settings: use model.attention.num_heads={heads}"
    )


def test_a_new_run_may_extend_the_context_and_not_take_it_back(tmp_path: Path) -> None:
    """YaRN is added or changed by a run that begins from the weights; nothing else may differ, and a resume changes
    nothing."""
    path, first, second = save(tmp_path, 1), YarnConfig(), YarnConfig(factor=8.0, original_max_seq_len=64)
    long = changed(BASE, yarn=first, max_seq_len=40 * 4096)
    checkpoint.read_state(path, long, extending=True)
    with pytest.raises(ConfigError, match=r"another model: model\.attention\.yarn=None there and \{.*'factor': 40\.0"):
        checkpoint.read_state(path, long)
    with pytest.raises(
        ConfigError, match=r"another model: model\.attention\.rope_theta=10000\.0 there and 5000\.0 here:"
    ):
        checkpoint.read_state(path, changed(long, rope_theta=5000.0), extending=True)
    content = json.loads((path / "state.json").read_text())
    content["model"]["attention"]["yarn"] = asdict(first)
    (path / "state.json").write_text(json.dumps(content))
    checkpoint.read_state(path, changed(long, yarn=second), extending=True)
    with pytest.raises(ConfigError, match=r"another model: model\.attention\.yarn\.factor=40\.0 there and 8\.0 here, "):
        checkpoint.read_state(path, changed(long, yarn=second))
    with pytest.raises(ConfigError, match=r"model\.attention\.yarn=\{.*\} there and None here"):
        checkpoint.read_state(path, BASE, extending=True)


def test_a_key_that_an_earlier_version_did_not_have_takes_its_default(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "state.json").read_text())
    assert content["model"].pop("dense_layers") == [] and content["model"]["attention"].pop("norm_eps") == 1e-6
    (path / "state.json").write_text(json.dumps(content))
    checkpoint.read_state(path, BASE, seed=3, seq_len=32)
    with pytest.raises(ConfigError, match=r"another model: model\.dense_layers=\[\] there and \[2\] here: use its own"):
        checkpoint.read_state(path, changed(BASE, dense_layers=(2,)), seed=3, seq_len=32)


@pytest.mark.parametrize(("written", "age"), [(4, "an earlier"), (6, "a later")])
def test_another_format_is_one_sentence(tmp_path: Path, written: int, age: str) -> None:
    path = save(tmp_path, 1)
    content = {"format": written, "step": 1, "model": {"dim": 64, "num_heads": 2}}
    (path / "state.json").write_text(json.dumps(content))
    rule = rf"^checkpoint format {written} is of {age} version, which this one cannot load: .*step-1 .* format 5; use"
    with pytest.raises(ConfigError, match=rule):
        checkpoint.read_state(path, BASE, seed=3, seq_len=32)


@pytest.mark.parametrize("broken", ["{", "[]", '{"step": 1}', '{"format": 5, "step": 1}', '{"format": "two"}'])
def test_a_broken_state_is_one_sentence(tmp_path: Path, broken: str) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_text(broken)
    with pytest.raises(DataError, match=r"state.json can't be read .*: resume from another checkpoint"):
        checkpoint.read_state(path, BASE, seed=3, seq_len=32)


def test_seed_and_length_are_the_checkpoints_own(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["model"] == json.loads(json.dumps(asdict(BASE)))
    with pytest.raises(ConfigError, match="seed=3 and this run has seed=1: use 3"):
        checkpoint.read_state(path, BASE, seed=1, seq_len=32)
    with pytest.raises(ConfigError, match="seq_len=32 and this run has seq_len=64: use 32"):
        checkpoint.read_state(path, BASE, seed=3, seq_len=64)
