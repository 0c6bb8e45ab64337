"""A resumed run is the uninterrupted one, bit by bit; another layout resumes the same state."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8moe.errors import ConfigError, DataError
from fp8moe.train import checkpoint
from fp8moe.train.build import state_tensors
from fp8moe.train.loop import run_to_end
from fp8moe.train.summary import Summary
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

SAVING = ["checkpoint.every=2", "checkpoint.keep=9", "steps=4"]


def run_once(settings: list[str], world_size: int) -> tuple[Summary, dict[str, Tensor]]:
    """A whole run; its summary and this rank's tensors at the end."""
    run = built(configured(settings, world_size=world_size))
    summary = run_to_end(run, time.perf_counter())
    local = {name: getattr(t, "_local_tensor", t) for name, t in state_tensors(run).items()}
    return summary, {name: tensor.clone() for name, tensor in local.items()}


def on_ranks(settings: list[str], world_size: int) -> list[tuple[Summary, dict[str, Tensor]]]:
    return [run_once(settings, 1)] if world_size == 1 else run_ranks(run_once, world_size, settings, world_size)


def told(run_dir: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["consumed_samples"]) for r in records]


@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_changes_no_bit(corpus: list[str], tmp_path: Path, world_size: int) -> None:
    settings = [*corpus, *SAVING]
    whole = on_ranks([*settings, f"run_dir={tmp_path / 'whole'}"], world_size)
    middle = tmp_path / "whole" / "checkpoints" / "step-2"
    elsewhere = on_ranks([*settings, f"run_dir={tmp_path / 'other'}", f"resume={middle}"], world_size)
    # The same in place, as after a crash: step 4 was never saved, step 3 was half written.
    shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
    shutil.rmtree(tmp_path / "crashed" / "checkpoints" / "step-4")
    (tmp_path / "crashed" / "checkpoints" / "step-3.tmp").mkdir()
    in_place = on_ranks([*settings, f"run_dir={tmp_path / 'crashed'}", "resume=auto"], world_size)
    for resumed in (elsewhere, in_place):
        for (summary, tensors), (expected, reference) in zip(resumed, whole, strict=True):
            assert tensors.keys() == reference.keys()
            assert [name for name in tensors if not torch.equal(tensors[name], reference[name])] == []
            assert (summary.val_loss, summary.steps) == (expected.val_loss, 4)
            assert summary.expert_token_shares == expected.expert_token_shares
    assert told(tmp_path / "other") == told(tmp_path / "whole")[2:]
    assert told(tmp_path / "crashed") == told(tmp_path / "whole")
    assert any(
        tensor.is_floating_point() and name.startswith("bias.") and tensor.any() for name, tensor in reference.items()
    )


def test_any_layout_resumes_any_other(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, *SAVING, "precision=fp32"]
    saved = on_ranks([*settings, f"run_dir={tmp_path / 'ep2'}"], 2)
    path = tmp_path / "ep2" / "checkpoints" / "step-4"
    alone = state_tensors(built(configured([*settings, f"resume={path}", "steps=9"])))
    for name, tensor in alone.items():
        one, other = (tensors[name] for _, tensors in saved)
        sharded = one.shape != tensor.shape
        assert sharded == ("experts" in name)
        assert torch.equal(tensor, torch.cat([one, other]) if sharded else one), name


PIPELINES = [("1f1b", 2), ("dualpipe", 2), ("dualpipev", 1)]


@pytest.mark.parametrize("schedule, pp", PIPELINES)
def test_a_pipelines_checkpoint_is_everyones(corpus: list[str], tmp_path: Path, schedule: str, pp: int) -> None:
    settings = [*corpus, *SAVING, "precision=fp32", "batch.micro_batch=1"]
    cut = [*settings, f"parallel.schedule={schedule}", f"parallel.pp={pp}"]
    saved = on_ranks([*cut, f"run_dir={tmp_path / 'cut'}"], pp)
    path = tmp_path / "cut" / "checkpoints" / "step-4"
    alone = state_tensors(built(configured([*settings, f"resume={path}", "steps=9"])))
    held: set[str] = set()
    for _, tensors in saved:
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, alone[name])] == []
        held |= tensors.keys()
    assert held == alone.keys()
    assert {summary.val_loss for summary, _ in saved} == {saved[0][0].val_loss}

    whole, _ = run_once([*settings, "steps=6", f"run_dir={tmp_path / 'on'}", f"resume={path}"], 1)
    for summary, _ in on_ranks([*cut, "steps=6", f"run_dir={tmp_path / 'cut'}", "resume=auto"], pp):
        assert summary.val_loss == pytest.approx(whole.val_loss, rel=1e-5)
        assert list(summary.expert_token_shares) == list(whole.expert_token_shares)


def test_old_checkpoints_go_and_the_newest_is_found(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=5", "checkpoint.every=1", "checkpoint.keep=2", f"run_dir={tmp_path}"], 1)
    root = tmp_path / "checkpoints"
    assert [path.name for path in checkpoint.complete(root)] == ["step-4", "step-5"]
    assert sorted(path.name for path in root.iterdir()) == ["step-4", "step-5"]
    assert checkpoint.find("auto", tmp_path) == root / "step-5" == checkpoint.find(str(tmp_path), None)
    with pytest.raises(ConfigError, match="resume=step-4 would branch off before step-5 of this run"):
        configured([*corpus, "steps=9", f"resume={root / 'step-4'}", f"run_dir={tmp_path}"])
    (root / "step-5" / ".metadata").unlink()
    assert checkpoint.find("auto", tmp_path) == root / "step-4"
    with pytest.raises(ConfigError, match="is after step 4 of steps=4: use more steps"):
        configured([*corpus, "steps=4", "resume=auto", f"run_dir={tmp_path}"])


def test_what_can_not_be_resumed_is_said_before_anything_is_read(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=1", f"run_dir={tmp_path}"], 1)
    resume = [*corpus, "steps=2", "resume=auto", f"run_dir={tmp_path}"]
    configured(resume)
    configured([*resume, "model.bias_gamma=0.0", "model.max_seq_len=2048"])  # no part of what a checkpoint is
    with pytest.raises(
        ConfigError, match=r"another model: model.dim=64 there and 96 here, model.topk=2 there and 1 here"
    ):
        configured([*resume, "model.dim=96", "model.topk=1"])
    with pytest.raises(ConfigError, match="seed=0 and this run has seed=1: use 0"):
        configured([*resume, "seed=1"])
    with pytest.raises(ConfigError, match="seq_len=32 and this run has seq_len=64: use 32"):
        configured([*resume, "seq_len=64"])
    state = tmp_path / "checkpoints" / "step-1" / "state.json"
    state.write_text("{")
    with pytest.raises(DataError, match=r"state\.json can't be read"):
        configured(resume)


def test_a_damaged_checkpoint_is_one_sentence(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=1", f"run_dir={tmp_path}"], 1)
    (data,) = (tmp_path / "checkpoints" / "step-1").glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(DataError, match=r"can't be read .*: resume from another checkpoint"):
        built(configured([*corpus, "steps=2", "resume=auto", f"run_dir={tmp_path}"]))
