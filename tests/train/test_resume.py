"""A resumed run is the uninterrupted one, bit by bit; another layout resumes the same state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8moe.errors import ConfigError, DataError, SpaceError
from fp8moe.train import checkpoint
from fp8moe.train.build import Run, save_checkpoint, state_tensors
from fp8moe.train.loop import run_to_end
from fp8moe.train.summary import Summary
from tests.parallel.ranks import run_ranks
from tests.train.runs import SMALL, built, configured, kept

SAVING = ["checkpoint.every=2", "checkpoint.keep=9", "steps=4"]


def run_once(settings: list[str], world_size: int) -> tuple[Summary, dict[str, Tensor]]:
    """A whole run; its summary and this rank's tensors at the end."""
    run = built(configured(settings, world_size=world_size))
    summary = run_to_end(run, time.perf_counter())
    return summary, stored(run)


def stored(run: Run) -> dict[str, Tensor]:
    """Copies of what a checkpoint would hold of this rank, flattened, by name@offset."""
    ranges = {
        f"{name}@{offset}": values.flatten().clone()
        for name, found in state_tensors(run).items()
        for offset, values in (found.ranges if isinstance(found, checkpoint.Pieces) else ((0, found),))
    }
    assert all(len(values) for values in ranges.values())
    return ranges


def joined(ranks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The logical tensors that the ranges of all ranks make up; ranges that several hold must be equal."""
    whole: dict[str, Tensor] = {}
    for ranges in ranks:
        for key, values in ranges.items():
            name, offset = key.split("@")
            start, end = int(offset), int(offset) + len(values)
            before = whole.get(name, values.new_zeros(0))
            if len(before) < end:
                missing = float("nan") if values.is_floating_point() else -1
                before = torch.cat([before, values.new_full((end - len(before),), missing)])
            there = before[start:end]
            is_set = ~torch.isnan(there) if values.is_floating_point() else there >= 0
            assert torch.equal(there[is_set], values[is_set]), f"{name} differs between ranks"
            before[start:end] = values
            whole[name] = before
    return whole


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def on_ranks(settings: list[str], world_size: int) -> list[tuple[Summary, dict[str, Tensor]]]:
    return [run_once(settings, 1)] if world_size == 1 else run_ranks(run_once, world_size, settings, world_size)


def told(run_dir: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["consumed_samples"]) for r in records]


DUALPIPE_EP2 = ("parallel.schedule=dualpipe", "parallel.pp=2", "parallel.ep=2", "batch.micro_batch=1", "precision=bf16")


MUON = ("optimizer=muon",)


@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, ()), (1, MUON), (2, ()), (4, DUALPIPE_EP2), (4, (*DUALPIPE_EP2, *MUON))]
)
def test_resuming_changes_no_bit(corpus: list[str], tmp_path: Path, world_size: int, layout: tuple[str, ...]) -> None:
    settings = [*corpus, *SAVING, *layout]
    whole = on_ranks([*settings, f"run_dir={tmp_path / 'whole'}"], world_size)
    middle = tmp_path / "whole" / "checkpoints" / "step-2"
    resumed = on_ranks([*settings, f"run_dir={tmp_path / 'other'}", f"resume={middle}"], world_size)
    # The same in place, as after a crash: step 4 was never saved, step 3 was half written.
    shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
    shutil.rmtree(tmp_path / "crashed" / "checkpoints" / "step-4")
    (tmp_path / "crashed" / "checkpoints" / "step-3.tmp").mkdir()
    resumed += on_ranks([*settings, f"run_dir={tmp_path / 'crashed'}", "resume=auto"], world_size)
    for (summary, tensors), (expected, reference) in zip(resumed, whole * 2, strict=True):
        assert tensors.keys() == reference.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], reference[name])] == []
        assert (summary.val_loss, summary.steps) == (expected.val_loss, 4)
        assert summary.expert_token_shares == expected.expert_token_shares
    assert told(tmp_path / "other") == told(tmp_path / "whole")[2:]
    assert told(tmp_path / "crashed") == told(tmp_path / "whole")
    saved_biases = [tensor for _, tensors in whole for name, tensor in tensors.items() if name.startswith("bias.")]
    assert any(bias.any() for bias in saved_biases)


def test_every_number_of_the_state_comes_back(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured([*corpus, f"run_dir={tmp_path}"]))
    run.step, run.optimizer.updates, run.sampler.consumed, run.guard.skipped = 5, 3, 41, 2
    path = save_checkpoint(run)
    assert path == tmp_path / "checkpoints" / "step-5"
    resumed = built(configured([*corpus, f"resume={path}"]))
    numbers = (resumed.step, resumed.optimizer.updates, resumed.sampler.consumed, resumed.guard.skipped)
    assert numbers == (5, 3, 41, 2)
    # Weights, and what FP8 keeps of them, are those of the masters that were loaded.
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, kept(resumed.optimizer)[name]["master"].to(parameter.dtype)), name


@pytest.mark.parametrize("optimizer", [(), MUON])
def test_any_layout_resumes_any_other(corpus: list[str], tmp_path: Path, optimizer: tuple[str, ...]) -> None:
    settings = [*corpus, *SAVING, "precision=fp32", *optimizer]
    saved = on_ranks([*settings, f"run_dir={tmp_path / 'ep2'}", "parallel.ep=2"], 4)
    path = tmp_path / "ep2" / "checkpoints" / "step-4"
    alone = joined([stored(built(configured([*settings, f"resume={path}", "steps=9"])))])
    assert differing(joined(tensors for _, tensors in saved), alone) == []
    assert not any(tensor.isnan().any() for tensor in alone.values())


PIPELINES = [("1f1b", 2), ("dualpipe", 2), ("dualpipev", 1)]


@pytest.mark.parametrize("schedule, pp", PIPELINES)
def test_a_pipelines_checkpoint_is_everyones(corpus: list[str], tmp_path: Path, schedule: str, pp: int) -> None:
    settings = [*corpus, *SAVING, "precision=fp32", "batch.micro_batch=1"]
    cut = [*settings, f"parallel.schedule={schedule}", f"parallel.pp={pp}"]
    saved = on_ranks([*cut, f"run_dir={tmp_path / 'cut'}"], pp)
    path = tmp_path / "cut" / "checkpoints" / "step-4"
    alone = joined([stored(built(configured([*settings, f"resume={path}", "steps=9"])))])
    assert differing(joined(tensors for _, tensors in saved), alone) == []
    assert {summary.val_loss for summary, _ in saved} == {saved[0][0].val_loss}

    whole, _ = run_once([*settings, "steps=6", f"run_dir={tmp_path / 'on'}", f"resume={path}"], 1)
    for summary, _ in on_ranks([*cut, "steps=6", f"run_dir={tmp_path / 'cut'}", "resume=auto"], pp):
        assert summary.val_loss == pytest.approx(whole.val_loss, rel=1e-5)
        assert list(summary.expert_token_shares) == list(whole.expert_token_shares)


def test_old_checkpoints_go_and_the_newest_is_found(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=5", "checkpoint.every=1", "checkpoint.keep=3", f"run_dir={tmp_path}"], 1)
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-3", "step-4", "step-5"]
    with pytest.raises(
        ConfigError, match="resume=step-4 must be the newest checkpoint of its own run_dir, which is step-5"
    ):
        configured([*corpus, "steps=9", f"resume={root / 'step-4'}", f"run_dir={tmp_path}"])
    assert configured([*corpus, "steps=9", f"resume={root / 'step-5'}", f"run_dir={tmp_path}"]).steps == 9
    elsewhere = f"run_dir={tmp_path / 'elsewhere'}"  # another run may begin from any of them
    assert configured([*corpus, "steps=9", f"resume={root / 'step-4'}", elsewhere]).steps == 9
    (root / "step-5" / "manifest.json").unlink()
    assert checkpoint.find("auto", tmp_path) == root / "step-4"
    with pytest.raises(ConfigError, match="has 4 steps done and steps=4: use steps=5 or more"):
        configured([*corpus, "steps=4", "resume=auto", f"run_dir={tmp_path}"])


def test_what_can_not_be_resumed_is_said_before_anything_is_read(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=1", f"run_dir={tmp_path}"], 1)
    resume = [*corpus, "steps=2", "resume=auto", f"run_dir={tmp_path}"]
    configured(resume)
    configured([*resume, "model.router.bias_gamma=0.0", "model.max_seq_len=2048"])  # no part of what a checkpoint is
    with pytest.raises(ConfigError, match=r"another model: model.dim=64 there and 96 here, model.router.topk=2 there"):
        configured([*resume, "model.dim=96", "model.router.topk=1"])
    with pytest.raises(ConfigError, match="seed=0 and this run has seed=1: use 0"):
        configured([*resume, "seed=1"])
    another = "step-1 was trained with optimizer.kind=adamw and this run has optimizer.kind=muon: use adamw"
    with pytest.raises(ConfigError, match=another):
        configured([*resume, *MUON])


def damage(path: Path) -> None:
    """Flip one bit in the middle of the tensors of a checkpoint."""
    file = next(path.glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_without_a_whole_checkpoint_is_one_sentence(corpus: list[str], tmp_path: Path) -> None:
    run_once([*corpus, "steps=1", f"run_dir={tmp_path}"], 1)
    damage(tmp_path / "checkpoints" / "step-1")
    with pytest.raises(DataError, match=r"none of the 1 checkpoints .*rank-0.safetensors has other bytes than were wr"):
        built(configured([*corpus, "steps=2", "resume=auto", f"run_dir={tmp_path}"]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_one_is_passed_over_for_the_one_before(
    corpus: list[str], tmp_path: Path, world_size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*corpus, "checkpoint.every=1", "checkpoint.keep=9", "steps=5"]
    whole = on_ranks([*settings, f"run_dir={tmp_path / 'whole'}"], world_size)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    root = tmp_path / "damaged" / "checkpoints"
    shutil.rmtree(root / "step-5")
    damage(root / "step-4")
    (root / "step-3" / "state.json").unlink()
    resumed = on_ranks([*settings, f"run_dir={tmp_path / 'damaged'}", "resume=auto"], world_size)
    for (summary, tensors), (expected, reference) in zip(resumed, whole, strict=True):
        assert [name for name in tensors if not torch.equal(tensors[name], reference[name])] == []
        assert summary.val_loss == expected.val_loss
    if world_size == 1:
        told_there = capfd.readouterr().err
        assert "step-4: rank-0.safetensors has other bytes" in told_there and "step-3: state.json is mi" in told_there
    assert checkpoint.problems(root / "step-4") == [] == checkpoint.problems(root / "step-3"), "written again"


def test_killed_at_any_moment_it_goes_on_to_the_bit(corpus: list[str], tmp_path: Path) -> None:
    settings = [*SMALL, *corpus, "checkpoint.every=2", "steps=12"]
    command = [sys.executable, "-m", "fp8moe", "train", *settings]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, f"run_dir={whole}"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    victim = subprocess.Popen([*command, f"run_dir={killed}"], env=environment, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not checkpoint.complete(killed / "checkpoints"):
        assert time.monotonic() < limit and victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    victim.wait(20)
    assert not (killed / "checkpoints" / "step-12").exists(), "it was killed before its end"
    command = [sys.executable, "-m", "fp8moe", "train", f"resume={killed}"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(run / "checkpoints" / "step-12" / "rank-0.safetensors") for run in (whole, killed))
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_starts_only_with_room_for_a_checkpoint(corpus: list[str], tmp_path: Path, monkeypatch) -> None:
    settings = [*corpus, "steps=1", f"run_dir={tmp_path}"]
    run = built(configured(settings))
    size = sum(t.numel() * t.element_size() for kinds in kept(run.optimizer).values() for t in kinds.values())
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((1.19, False), (1.21, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=int(free * size)))
        if enough:
            built(configured(settings))
            continue
        with pytest.raises(SpaceError, match=r"GB free and a checkpoint needs .* GB \(1.2 x its .* GB\): free space o"):
            built(configured(settings))
        built(configured([*settings, "checkpoint.at_end=false"]))
