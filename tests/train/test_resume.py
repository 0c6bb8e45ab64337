"""A resumed run is the uninterrupted one, bit by bit; another layout resumes the same state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8moe.errors import ConfigError, DataError, SpaceError
from fp8moe.train import checkpoint, loop
from fp8moe.train import step as step_module
from fp8moe.train.loop import run_to_end
from fp8moe.train.lr import learning_rate
from fp8moe.train.metrics import StepReport
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_checkpoint
from fp8moe.train.step import train_step
from fp8moe.train.summary import Summary
from tests.faults.runs import forked, wait_until
from tests.parallel.ranks import run_ranks
from tests.train.runs import SMALL, built, configured, differing, joined, kept, stored

SAVING = ["checkpoint.every=2", "checkpoint.keep=9", "steps=4", "ema.decay=0.9"]


def run_once(settings: list[str], world_size: int) -> tuple[Summary, dict[str, Tensor]]:
    """A whole run; its summary and this rank's tensors at the end."""
    run = built(configured(settings, world_size=world_size))
    summary = run_to_end(run, time.perf_counter())
    return summary, stored(run)


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
    stacked = json.loads((path / "state.json").read_text())["shapes"]["blocks.1.moe.experts.down.weight"]
    assert stacked == [4, 64, 32], "all experts, of which a rank held two"


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
    shapes = json.loads((path / "state.json").read_text())["shapes"]
    whole_model = built(configured([*settings, "run_dir=null"])).model
    assert shapes == {name: list(parameter.shape) for name, parameter in whole_model.named_parameters()}

    whole, _ = run_once([*settings, "steps=6", f"run_dir={tmp_path / 'on'}", f"resume={path}"], 1)
    for summary, _ in on_ranks([*cut, "steps=6", f"run_dir={tmp_path / 'cut'}", "resume=auto"], pp):
        assert summary.val_loss == pytest.approx(whole.val_loss, rel=1e-5)
        assert list(summary.expert_token_shares) == list(whole.expert_token_shares)
    (step, loss, *_), (same_step, their_loss, *_) = told(tmp_path / "on")[0], told(tmp_path / "cut")[4]
    assert step == same_step == 5 and loss == pytest.approx(their_loss, rel=1e-6), "the first loss on another layout"


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
    with pytest.raises(ConfigError, match=r"model: model.dim=64 there and 96 here, and 1 more model setting: use"):
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
    settings = [*SMALL, *corpus, "checkpoint.every=2", "steps=8", "ema.decay=0.9", "validation.ema=true"]
    command = ["train", *settings]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = forked([*command, f"run_dir={whole}"], 1, tmp_path / "first")
    assert done.wait() == [0], done.said()
    victim = forked([*command, f"run_dir={killed}"], 1, tmp_path / "victim")
    assert wait_until(lambda: bool(checkpoint.complete(killed / "checkpoints")), victim)
    victim.kill()
    assert not (killed / "checkpoints" / "step-8").exists(), "it was killed before its end"
    done = forked(["train", f"resume={killed}"], 1, tmp_path / "second")
    assert done.wait() == [0], done.said()
    one, other = (load_file(run / "checkpoints" / "step-8" / "rank-0.safetensors") for run in (whole, killed))
    kinds = {name.partition(".")[0] for name in one}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "bias", "load", "rng"}
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def dies(settings: list[str], world_size: int) -> None:
    """A run whose ranks are killed after step 3, as soon as the checkpoint of step 2 is complete."""

    def step(run: Run, **options: Any) -> StepReport:
        report = train_step(run, **options)
        limit = time.monotonic() + 60
        while run.step == 3:
            if checkpoint.complete(run.run_dir / "checkpoints") or time.monotonic() > limit:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return report

    loop.train_step = step  # in this process, which is a test's own
    run_once(settings, world_size)


def test_killed_under_dualpipe_it_goes_on_to_the_bit(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, *SAVING, "parallel.schedule=dualpipe", "parallel.pp=2"]
    whole = on_ranks([*settings, f"run_dir={tmp_path / 'whole'}"], 2)
    killed = [*settings, f"run_dir={tmp_path / 'killed'}"]
    with pytest.raises(AssertionError, match="died without a result"):
        run_ranks(dies, 2, killed, 2)
    assert [path.name for path in checkpoint.complete(tmp_path / "killed" / "checkpoints")] == ["step-2"]
    for (summary, tensors), (expected, reference) in zip(on_ranks([*killed, "resume=auto"], 2), whole, strict=True):
        assert {"ema", "bias", "master"} <= {name.partition(".")[0] for name in reference}
        assert tensors.keys() == reference.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], reference[name])] == []
        assert (summary.precision, summary.val_loss) == ("fp8", expected.val_loss)
    assert told(tmp_path / "killed") == told(tmp_path / "whole")


def draws(settings: list[str], world_size: int) -> list[float]:
    """The learning rates of a run that draws a factor of it from the global generator in each step."""
    rates: list[float] = []

    def drawn(*arguments: Any) -> float:
        rates.append(learning_rate(*arguments) * (0.5 + float(torch.rand(()))))
        return rates[-1]

    step_module.learning_rate = drawn
    torch.manual_seed(time.monotonic_ns())  # what a process begins with is chance
    try:
        run_once(settings, world_size)
    finally:
        step_module.learning_rate = learning_rate
    return rates


def test_random_draws_resume_and_belong_to_a_rank(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, *SAVING, "precision=bf16"]
    whole = run_ranks(draws, 2, [*settings, f"run_dir={tmp_path / 'whole'}"], 2)
    assert set(whole[0]).isdisjoint(whole[1]), "each rank has states of its own"
    middle = tmp_path / "whole" / "checkpoints" / "step-2"
    assert {"rng.cpu.0", "rng.cpu.1"} <= checkpoint.stored_names(middle)
    resumed = run_ranks(draws, 2, [*settings, f"run_dir={tmp_path / 'other'}", f"resume={middle}"], 2)
    assert resumed == [rates[2:] for rates in whole]


def test_random_states_of_other_ranks_are_left(
    corpus: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = built(configured([*corpus, f"run_dir={tmp_path}"]))
    seeded = torch.get_rng_state()
    torch.rand(3)
    path = save_checkpoint(run)
    drawn = torch.get_rng_state()
    caplog.set_level("INFO")
    built(configured([*corpus, f"resume={path}"]))
    assert torch.equal(torch.get_rng_state(), drawn) and "random states" not in caplog.text
    run_ranks(seeded_anew, 2, [*corpus, f"resume={path}"], seeded)
    built(configured([*corpus, "seed=3"]))
    assert not torch.equal(torch.get_rng_state(), seeded), "another seed draws otherwise"


def seeded_anew(settings: list[str], seeded: Tensor) -> None:
    run = built(configured(settings, world_size=2))
    assert torch.equal(torch.get_rng_state(), seeded) == (run.mesh.rank == 0)


def test_a_run_starts_only_with_room_for_a_checkpoint(corpus: list[str], tmp_path: Path, monkeypatch) -> None:
    settings = [*corpus, "steps=1", "ema.decay=0.9", f"run_dir={tmp_path}"]
    run = built(configured(settings))
    size = sum(t.numel() * t.element_size() for kinds in kept(run.optimizer).values() for t in kinds.values())
    size += 4 * sum(parameter.numel() for parameter in run.model.parameters())  # the average
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((1.19, False), (1.21, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=int(free * size)))
        if enough:
            built(configured(settings))
            continue
        with pytest.raises(SpaceError, match=r"GB free and a checkpoint needs .* GB \(1.2 x its .* GB\): free space o"):
            built(configured(settings))
        built(configured([*settings, "checkpoint.at_end=false"]))
