"""Runs of GRPO: the reward rises, a resumed run is the same bits, layouts agree, nothing bad is lost in silence."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.cli.compose import as_yaml
from fp8moe.errors import ConfigError
from fp8moe.generate.captured import DecodingGraphs, decoding_graphs
from fp8moe.layers.linear import main_grad_of
from fp8moe.parallel.mesh import Mesh
from fp8moe.post import grpo, rollouts
from fp8moe.post.grpo import Grpo
from fp8moe.post.rollouts import FOLDER
from fp8moe.train.config import TrainConfig
from fp8moe.train.json_lines import SAMPLES, read_lines
from fp8moe.train.loop import train
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.post.runs import policy_config, policy_run
from tests.train.recorded_graph import RecordedGraph, as_on_a_gpu
from tests.train.runs import configured


def steps(config: TrainConfig, count: int) -> list[dict[str, Any]]:
    """The records of the first steps."""
    run, method = policy_run(config)
    found = []
    for _ in range(count):
        report = train_step(run, next_work=method.work)
        found.append({**dataclasses.asdict(report), **method.figures(run)})
    return found


def test_the_reward_rises(corpus: list[str]) -> None:
    found = steps(policy_config(corpus, "grpo.minibatches=2", "grpo.epochs=2", "optimizer.schedule.peak=3e-3"), 32)
    rewards = [one["reward"] for one in found if "reward" in one]
    assert len(rewards) == 8 and sum(rewards[-2:]) > sum(rewards[:2]) + 0.2
    assert found[0]["kl"] == pytest.approx(0, abs=1e-9) and found[-1]["kl"] > 1e-3
    assert [one["rollouts"] for one in found[:8]] == [1] * 4 + [2] * 4
    assert [one["consumed_samples"] for one in found[:3]] == [16, 32, 48]
    for one in found[::4]:
        assert one["mismatch_largest"] < 1e-4 and one["ratio_deviation"] < 1e-5, "the first update is on its policy"
    assert any(one["clip_share"] > 0 for one in found)


def test_packing_samples_into_rows_changes_nothing(corpus: list[str]) -> None:
    settings = ("grpo.minibatches=2", "grpo.kl=0.1")
    packed = steps(policy_config(corpus, *settings), 3)
    alone = steps(policy_config(corpus, *settings, "data.document_mask=false"), 3)
    assert [one["tokens"] for one in packed] == [one["tokens"] for one in alone]
    for name in ("loss", "grad_norm", "reward", "kl", "entropy"):
        ours, theirs = ([one[name] for one in found if name in one] for found in (packed, alone))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def of_one_process() -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Records of one process, by the settings that are no layout's."""
    return {}


LAYOUTS = [
    (1, ("parallel.schedule=dualpipev",)),
    (2, ("parallel.ep=2", "batch.micro_batch=2")),
    (2, ("parallel.cp=2", "grpo.mtp_weight=0.1")),
    (2, ("parallel.pp=2", "parallel.schedule=1f1b", "batch.micro_batch=2", "grpo.rollout_batch=24")),
    (2, ("parallel.pp=2", "parallel.schedule=dualpipev", "batch.micro_batch=2", "model.num_layers=4")),
    (4, ("parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2", "batch.micro_batch=2")),
    (4, ("parallel.pp=2", "parallel.schedule=dualpipe", "parallel.cp=2", "batch.micro_batch=2")),
]


@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_layouts_agree(
    world_size: int,
    settings: tuple[str, ...],
    corpus: list[str],
    of_one_process: dict[tuple[str, ...], list[dict[str, Any]]],
) -> None:
    alike = tuple(one for one in settings if one.startswith(("grpo.mtp", "model.")))
    if alike not in of_one_process:
        of_one_process[alike] = steps(policy_config(corpus, *alike), 2)
    expected = of_one_process[alike]
    config = policy_config(corpus, *settings, world_size=world_size)
    ranks = run_ranks(steps, world_size, config, 2) if world_size > 1 else [steps(config, 2)]
    for found in ranks:
        for name in ("tokens", "loss", "grad_norm", "reward", "kl", "entropy", "completion_length", "clip_share"):
            assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], rel=2e-3, abs=1e-6)


def predicted(config: TrainConfig) -> tuple[int, int]:
    """What the first update predicts, by the main model and by the MTP module."""
    run, method = policy_run(config)
    counts = method.work(run).counts
    return counts.main_tokens, counts.mtp_tokens


def test_ranks_that_share_sequences_predict_as_many_tokens(corpus: list[str]) -> None:
    # A chunk of 24 tokens ends within the completions, behind prompts of fewer tokens.
    settings = ("grpo.held_out_count=0", "seq_len=96", "data.document_mask=false")
    main, mtp = predicted(policy_config(corpus, *settings))
    assert main > mtp > 0
    config = policy_config(corpus, *settings, "parallel.cp=2", world_size=2)
    assert run_ranks(predicted, 2, config) == [(main, mtp)] * 2


def test_in_fp8_the_mismatch_of_rollout_and_training_is_measured(corpus: list[str]) -> None:
    wide = [f"model.{name}=128" for name in ("dim", "dense_hidden", "attention.q_lora_rank", "attention.kv_lora_rank")]
    heads = ["model.attention.nope_dim=32", "model.attention.rope_dim=32", "model.attention.v_dim=64"]
    sizes = [*wide, *heads, "model.experts.hidden=128", "seq_len=64", "grpo.samples=4"]
    (found,) = steps(policy_config(corpus, *sizes, "precision=fp8"), 1)
    assert 1e-6 < found["mismatch_kl"] < 0.02 and found["mismatch_largest"] > 1e-3
    assert found["ratio_deviation"] < 1e-5 and found["kl"] == pytest.approx(0, abs=1e-6)


def last_checkpoint(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def test_a_run_that_resumes_between_updates_is_the_same_to_the_bit(corpus: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    every = ("grpo.minibatches=3", "grpo.prompts=3", "checkpoint.every=2", "validation.every=2", "plan=off")
    train(policy_config(corpus, "steps=1", "grpo.kl=0", f"run_dir={base}"), as_yaml, method=Grpo())
    every = (*every, f"init_from={base}", "batch.sequences=8", "grpo.kl=0.05")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(policy_config(corpus, *every, "steps=5", f"run_dir={whole}"), as_yaml, method=Grpo())
    train(policy_config(corpus, *every, "steps=2", f"run_dir={cut}"), as_yaml, method=Grpo())
    train(policy_config(corpus, *every, "steps=5", f"run_dir={cut}", "resume=required"), as_yaml, method=Grpo())
    assert last_checkpoint(whole) == last_checkpoint(cut)
    one, other = (read_lines(path / "metrics.jsonl")[0] for path in (whole, cut))
    timed = {"seconds", "tokens_per_second", "time", "memory_bytes", "rollout_seconds", "rollout_tokens_per_second"}
    for ours, theirs in zip(one[:], other, strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    assert "held_out_accuracy" in one[1] and "reward" in one[3] and "reward" not in one[2] and one[4]["kl"] > 0
    assert sorted(path.name for path in (cut / FOLDER).iterdir()) == ["batch-000000.npz", "batch-000001.npz"]
    whens = [sample["when"] for sample in json.loads((whole / SAMPLES).read_text())["samples"]]
    assert whens == ["before"] * 4 + ["after step 5"] * 4


def test_groups_that_score_alike_are_counted_and_give_no_gradient(corpus: list[str]) -> None:
    config = policy_config(corpus, "grpo.rewards=[tests.post.given_rewards:alike]", "grpo.kl=0.5")
    run, method = policy_run(config)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    report = train_step(run, next_work=method.work)
    figures = method.figures(run)
    assert figures["groups_alike"] == figures["groups_drawn"] == 4 and figures["reward"] == 0.5
    assert report.grad_norm == 0 and report.tokens == 0 and not report.skipped
    assert not any(bool(main_grad_of(parameter).any()) for parameter in run.model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
    again = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, dynamic_rounds=2))
    run, method = policy_run(again)
    train_step(run, next_work=method.work)
    assert method.figures(run)["groups_drawn"] == 12


def test_dynamic_sampling_draws_problems_until_groups_have_spread(corpus: list[str]) -> None:
    rewards = "grpo.rewards=[tests.post.given_rewards:letters]"
    found = steps(policy_config(corpus, rewards, "grpo.dynamic_rounds=3", "grpo.max_tokens=1"), 1)[0]
    assert found["groups_drawn"] > 4 or found["groups_alike"] == 0
    assert found["tokens"] > 0


def test_a_sample_that_can_not_be_scored_is_named_counted_and_left_out(
    corpus: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    rewards = "grpo.rewards=[tests.post.given_rewards:fails_on_vowels,format]"
    found = steps(policy_config(corpus, rewards, "grpo.max_tokens=20"), 1)[0]
    assert 0 < found["reward_failures"] < 32 and 0 < found["reward"] < 1
    named = [record.message for record in caplog.records if "is excluded" in record.message]
    assert named and all("of 'What is " in message for message in named)
    assert any("raised KeyError: 'a in it'" in message for message in named)
    assert found["tokens"] < 32 * found["completion_length"]


def workers() -> list[str]:
    """The processes of rewards that this one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and b"function_worker" in (path / "cmdline").read_bytes():
                found.append(path.name)
    return found


def test_a_reward_that_hangs_leaves_out_its_sample_and_no_process(
    corpus: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewards = ("grpo.rewards=[tests.post.given_rewards:hangs_on_vowels]", "grpo.reward_timeout=0.3")
    sizes = (
        "grpo.prompts=1",
        "batch.sequences=8",
        "grpo.max_tokens=4",
        "grpo.held_out_count=0",
        "plan=off",
        "grpo.kl=0",
    )
    config = policy_config(corpus, *rewards, *sizes, "steps=1", f"run_dir={tmp_path}", "seed=3")
    gc.collect()
    before = workers()
    train(config, as_yaml, method=Grpo())
    gc.collect()
    assert workers() == before, "its process ends with the run"
    (found,) = read_lines(tmp_path / "metrics.jsonl")[0]
    named = [record.message for record in caplog.records if "is excluded" in record.message]
    assert 0 < found["reward_failures"] == len(named) < 5 and 0 < found["reward"] <= 1
    says = "is excluded: the reward tests.post.given_rewards:hangs_on_vowels took longer than grpo.reward_timeout=0.3 s"
    assert all(message.endswith(says) for message in named)


def test_samples_of_captured_forwards_are_the_same(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is the update that learns from them."""
    made: list[RecordedGraph] = []

    def graphs(mesh: Mesh, num_experts: int, tokens: int) -> DecodingGraphs:
        return decoding_graphs(mesh, num_experts, tokens, lambda: lambda: made.append(RecordedGraph()) or made[-1])

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(rollouts, "decoding_graphs", graphs)
    monkeypatch.setattr(grpo, "choose_device", lambda config: torch.device("cuda", 0))
    sizes = ("grpo.prompts=2", "grpo.samples=4", "grpo.max_tokens=6", "grpo.held_out_count=2", "batch.sequences=8")
    (plain,) = steps(policy_config(corpus, *sizes), 1)
    assert not made
    (captured,) = steps(policy_config(corpus, *sizes, "grpo.cuda_graphs=true"), 1)
    assert len(made) == 2, "held-out problems and a batch"
    for name in ("loss", "grad_norm", "reward", "kl", "entropy", "mismatch_kl", "completion_length"):
        assert plain[name] == captured[name]


def test_what_can_not_be_is_refused(corpus: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"learns from problems and data.source is indexed: go on with a run of its"):
        Grpo().open_data(configured(corpus), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"grpo.max_tokens=100 follow, and a row has seq_len \+ 1 = 49: use seq_len="):
        policy_run(policy_config(corpus, "grpo.max_tokens=100"))
    with pytest.raises(ConfigError, match=r"cuda_graphs=true needs a GPU and this run computes on the cpu: use .*fals"):
        policy_run(policy_config(corpus, "grpo.cuda_graphs=true"))
    with pytest.raises(ConfigError, match=r"grpo.rewards=none is not one of accuracy, format, think"):
        policy_run(policy_config(corpus, "grpo.rewards=[none]"))
    with pytest.raises(ConfigError, match=r"rewards=tests.post.given_rewards:nothing can't be imported"):
        policy_run(policy_config(corpus, "grpo.rewards=[tests.post.given_rewards:nothing]"))
    with pytest.raises(ValueError, match=r"grpo.minibatches=3 does not divide grpo.prompts=4: use 2"):
        policy_config(corpus, "grpo.minibatches=3")
    with pytest.raises(ValueError, match=r"^batch.sequences=24 .* the 28 samples .* = 14 x 4 / 2: use .*=32, or"):
        sizes = ("grpo.prompts=14", "grpo.samples=4", "grpo.minibatches=2")
        policy_config(corpus, *sizes, "batch.sequences=24", world_size=2)
