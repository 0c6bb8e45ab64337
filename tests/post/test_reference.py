"""A reference that is replaced along the run: which weights it is; no resume, layout or rollback loses them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8moe.__main__ import main
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.errors import ConfigError
from fp8moe.post.grpo import Grpo
from fp8moe.post.reference import reference_weights
from fp8moe.post.rollouts import load
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig
from fp8moe.train.json_lines import read_lines
from fp8moe.train.kept_reference import AT, KeptReference
from fp8moe.train.loop import train
from fp8moe.train.opening import opening
from fp8moe.train.rollback import roll_back
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_checkpoint
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.post.runs import policy_config, policy_run
from tests.train.runs import joined, stored

# Two updates a batch, a reference of two batches, weights and router biases that move within them.
SETTINGS = (
    *("grpo.minibatches=2", "grpo.kl=0.3", "optimizer.schedule.peak=3e-3", "model.router.bias_gamma=0.01", "plan=off"),
    *("checkpoint.every=1", "checkpoint.keep=9", "checkpoint.background=false", "validation.every=100"),
    *("grpo.held_out_count=0", "grpo.samples=4", "batch.sequences=8"),
)
EVERY = "grpo.reference_every=4"


def checkpoint_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step}" / "rank-0.safetensors")


def part(tensors: dict[str, Tensor], *kinds: str) -> dict[str, Tensor]:
    """Tensors of these kinds, by the name behind the kind."""
    found = {name.partition(".") for name in tensors}
    return {rest: tensors[f"{kind}{dot}{rest}"] for kind, dot, rest in found if kind in kinds}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def grpo(corpus: list[str], run_dir: Path, *settings: str, resume: str = "auto") -> Path:
    """The run, to its end."""
    found = policy_config(corpus, *SETTINGS, f"run_dir={run_dir}", f"resume={resume}", *settings)
    train(found, as_yaml, method=Grpo())
    return run_dir


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The records of its steps, without times, and without the validation that a run ends with."""
    left_out = {"seconds", "tokens_per_second", "time", "memory_bytes", "rollout_seconds", "rollout_tokens_per_second"}
    left_out |= {"val_loss", "val_bits_per_byte"}
    return [{k: v for k, v in line.items() if k not in left_out} for line in read_lines(run_dir / "metrics.jsonl")[0]]


@pytest.fixture(scope="module")
def whole(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without an end, the reference replaced after the fourth."""
    return grpo(corpus, tmp_path_factory.mktemp("whole") / "run", "steps=6", EVERY)


@pytest.fixture(scope="module")
def first(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a reference that stays."""
    return grpo(corpus, tmp_path_factory.mktemp("first") / "run", "steps=4")


def test_it_is_the_policy_of_the_step_that_it_was_replaced_after(whole: Path) -> None:
    for step, of in ((1, None), (3, None), (4, 4), (5, 4), (6, 4)):
        saved = checkpoint_at(whole, step)
        assert saved[AT].tolist() == ([0, 0] if of is None else [4, 32])
        if of is not None:
            weights = checkpoint_at(whole, of)
            assert equal(part(saved, "reference"), part(weights, "master"))
            assert equal(part(saved, "reference_bias"), part(weights, "bias"))
    assert not equal(part(saved, "reference"), part(saved, "master"))
    assert not equal(part(saved, "reference_bias"), part(saved, "bias"))
    found = lines(whole)
    assert [line.get("reference_step") for line in found] == [0, None, 0, None, 4, None]
    assert found[3]["kl"] > 1e-3 and found[4]["kl"] == pytest.approx(0, abs=1e-9)
    assert found[4]["ratio_deviation"] < 1e-5 and found[5]["kl"] > 1e-9
    batches = [load(whole, number) for number in (1, 2)]
    assert [batch is not None and torch.equal(batch.old, batch.reference) for batch in batches] == [False, True]


def test_it_equals_a_run_that_is_given_the_reference_by_hand(
    whole: Path, first: Path, corpus: list[str], tmp_path: Path
) -> None:
    assert not any(name.startswith("reference") for name in checkpoint_at(first, 4))
    own = f"{first}/checkpoints/step-4"
    second = grpo(corpus, tmp_path / "second", "steps=6", f"init_from={own}", resume=own)
    for step, folder in ((4, first), (5, second), (6, second)):
        for kind in ("master", "exp_avg", "bias"):
            assert equal(part(checkpoint_at(whole, step), kind), part(checkpoint_at(folder, step), kind)), (step, kind)
    assert [line["kl"] for line in lines(second)] == [line["kl"] for line in lines(whole)[4:]]


def killed(config: TrainConfig) -> None:
    """Ends without a word when the reference has been replaced, before that step is saved."""
    take = KeptReference.take

    def taken(self: KeptReference, step: int, consumed: int) -> None:
        take(self, step, consumed)
        if step:
            os.kill(os.getpid(), signal.SIGKILL)

    KeptReference.take = taken  # type: ignore[method-assign]
    train(config, as_yaml, method=Grpo())


def test_a_run_that_is_killed_and_resumed_is_the_same_to_the_bit(
    whole: Path, corpus: list[str], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    config = policy_config(corpus, *SETTINGS, f"run_dir={cut}", "steps=6", EVERY, "checkpoint.every=3")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(config,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == ["step-3"]
    (cut / "lock").unlink(missing_ok=True)
    for steps in (5, 6):
        grpo(corpus, cut, f"steps={steps}", EVERY, "checkpoint.background=true")
        assert equal(checkpoint_at(cut, steps), checkpoint_at(whole, steps)), steps
    assert lines(cut)[-3:] == lines(whole)[-3:]


def test_it_goes_with_a_checkpoint_behind_a_url(whole: Path, corpus: list[str], tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{whole}/checkpoints/step-4", f"/{tmp_path.name}/step-4", recursive=True)
    grpo(corpus, tmp_path / "one", "steps=5", EVERY, f"checkpoint.path={url}/own", resume=f"{url}/step-4")
    assert lines(tmp_path / "one") == lines(whole)[4:5]
    assert AT in checkpoint.stored_names(checkpoint.location(f"{url}/own/step-5"))


def moved(corpus: list[str], world_size: int, steps: int, *settings: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train some steps from the state that `settings` may name, save -> the KL of each, what this rank holds."""
    run, method = policy_run(policy_config(corpus, *SETTINGS, *settings, world_size=world_size))
    found = []
    for _ in range(steps):
        train_step(run, next_work=method.work)
        found.append(method.figures(run)["kl"])
    save_checkpoint(run)
    return found, stored(run)


def test_layouts_agree_and_any_resumes_any_other(whole: Path, corpus: list[str], tmp_path: Path) -> None:
    ways = [(2, 4, "parallel.ep=2"), (1, 0, "parallel.ep=1"), (2, 2, "parallel.ep=1")]
    first: dict[str, Tensor] | None = None
    came_from = "resume=none"
    for number, (world_size, steps, layout) in enumerate(ways):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        settings = (EVERY, "grpo.prompts=4", layout, came_from, f"run_dir={run_dir}")
        ranks = (
            run_ranks(moved, world_size, corpus, world_size, steps, *settings)
            if world_size > 1
            else [moved(corpus, 1, steps, *settings)]
        )
        here = {name: one for name, one in joined(tensors for _, tensors in ranks).items() if name.startswith("ref")}
        first = first or here
        assert equal(first, here) and first[AT].tolist() == [4, 32]
        if steps:
            expected = [line["kl"] for line in lines(whole)][-steps if number else 0 :][:steps]
            assert ranks[0][0] == ranks[1][0] == pytest.approx(expected, rel=2e-2, abs=1e-6)
        came_from = f"resume={run_dir / 'checkpoints' / 'step-4'}"


def stepped(run: Run, method: Grpo, count: int) -> Run:
    for _ in range(count):
        train_step(run, next_work=method.work)
    return run


def weights_of(run: Run) -> list[Tensor]:
    return [master.clone() for master in run.optimizer.masters()]  # type: ignore[union-attr]


def is_reference(run: Run, step: int, masters: list[Tensor]) -> bool:
    assert run.reference is not None
    same = all(torch.equal(one, other) for one, other in zip(run.reference.masters, masters, strict=True))
    return same and run.reference.step == step


def test_a_rollback_has_the_reference_of_its_checkpoint(corpus: list[str], tmp_path: Path) -> None:
    run, method = policy_run(policy_config(corpus, *SETTINGS, EVERY, f"run_dir={tmp_path}"))
    begun = weights_of(run)
    assert "the reference is the policy after step 0, replaced every 4 steps: 0.000" in opening(run)
    save_checkpoint(stepped(run, method, 3))
    stepped(run, method, 2)
    assert run.reference is not None and run.reference.step == 4
    run.guard.problem = "a planted problem"
    roll_back(run)
    assert run.step == 3 and is_reference(run, 0, begun)
    stepped(run, method, 1)  # the last update of the third batch, behind the samples that a replacement was due at
    assert run.sampler.consumed == 6 * 8 and is_reference(run, 4, weights_of(run))
    stepped(run, method, 2)
    assert run.step == 6 and is_reference(run, 6, weights_of(run)), "due again after four batches"


def test_a_checkpoint_without_one_goes_on_with_the_first_weights(
    whole: Path, first: Path, corpus: list[str], tmp_path: Path
) -> None:
    resumed = (f"resume={first}", f"run_dir={tmp_path / 'next'}", EVERY)
    with pytest.raises(ConfigError, match=r"grpo.kl needs the weights that the run began from and init_from is null"):
        policy_run(policy_config(corpus, *SETTINGS, *resumed))
    run, method = policy_run(policy_config(corpus, *SETTINGS, *resumed, f"init_from={whole}"))
    given, _ = policy_run(policy_config(corpus, *SETTINGS, f"init_from={whole}"))
    assert is_reference(run, 0, weights_of(given)) and not is_reference(run, 0, weights_of(run))
    stepped(run, method, 4)
    assert is_reference(run, 8, weights_of(run))
    run.guard.problem = "a planted problem"
    roll_back(run)
    assert run.step == 4 and is_reference(run, 0, weights_of(given))


def test_averaged_weights_that_a_run_began_from_are_its_reference(
    first: Path, corpus: list[str], tmp_path: Path
) -> None:
    origin = grpo(corpus, tmp_path / "averaged", "steps=2", "ema.decay=0.5")
    begun = (f"init_from={origin}", "init_from_ema=true", f"run_dir={tmp_path / 'run'}", f"resume={first}", "steps=5")
    run, _ = policy_run(policy_config(corpus, *SETTINGS, *begun))
    saved = checkpoint_at(origin, 2)
    assert run.step == 4 and run.reference is not None and run.reference.step == 0
    kept = {f"ema.{name}": one.tensors["reference"] for name, (one,) in run.reference.held().items()}
    assert all(torch.equal(values, saved[name].flatten()) for name, values in kept.items())
    assert not equal(part(saved, "ema"), part(saved, "master"))


def test_it_stays_where_it_is_replaced_no_more(whole: Path, corpus: list[str], tmp_path: Path) -> None:
    settings = (f"resume={whole}/checkpoints/step-4", f"run_dir={tmp_path}", f"init_from={tmp_path / 'gone'}")
    run, method = policy_run(policy_config(corpus, *SETTINGS, *settings))
    kept = weights_of(run)
    save_checkpoint(stepped(run, method, 4))
    assert is_reference(run, 4, kept) and checkpoint_at(tmp_path, 8)[AT].tolist() == [4, 32]


def test_a_forward_by_it_reads_its_weights_and_router_biases(
    whole: Path, first: Path, corpus: list[str], tmp_path: Path
) -> None:
    """The reference of step 6 is the policy of step 4: within the block the model is what that checkpoint holds."""
    settings = (EVERY, "steps=7", f"resume={whole}", f"run_dir={tmp_path}")
    run, _ = policy_run(policy_config(corpus, *SETTINGS, *settings))
    own, kept = (part(checkpoint_at(folder, step), "bias") for folder, step in ((whole, 6), (first, 4)))
    norm, kept_norm = (checkpoint_at(folder, step)["master.norm.weight"] for folder, step in ((whole, 6), (first, 4)))

    def held() -> tuple[dict[str, Tensor], Tensor]:
        biases = {name: router.bias_E.clone() for name, router in run.routers().items()}
        return biases, run.model.get_parameter("norm.weight").detach().clone()

    assert run.reference is not None and not equal(own, kept) and not torch.equal(norm, kept_norm)
    for _ in range(2):
        biases, weight = held()
        assert equal(biases, own) and torch.equal(weight, norm)
        with reference_weights(run, run.reference):
            biases, weight = held()
        assert equal(biases, kept) and torch.equal(weight, kept_norm)
    with pytest.raises(OSError, match="lost"), reference_weights(run, run.reference):
        raise OSError("lost")
    assert equal(held()[0], own) and torch.equal(held()[1], norm)


def test_other_commands_read_such_a_checkpoint(
    whole: Path, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(whole)]) == 0 and main(["inspect", str(whole)]) == 0
    assert "reference " in capsys.readouterr().out
    assert main(["export", str(whole), f"{tmp_path / 'released'}", "--precision", "fp32"]) == 0
    exported = load_file(next((tmp_path / "released").glob("*.safetensors")))["model.norm.weight"]
    saved = checkpoint_at(whole, 6)
    assert torch.equal(exported, saved["master.norm.weight"])
    assert not torch.equal(exported, saved["reference.norm.weight"])
    run, _ = policy_run(policy_config(corpus, *SETTINGS, EVERY, f"init_from={whole}"))
    assert torch.equal(run.model.get_parameter("norm.weight"), exported) and is_reference(run, 0, weights_of(run))
    assert main(["generate", str(whole), "--prompt", "What is 1 + 1?", "--max-tokens", "2"]) == 0


def test_it_is_replaced_where_batches_end() -> None:
    found = compose(["experiment=r1_zero", "batch.sequences=512"]).config.grpo
    due, taken = [], 0
    for step in range(1, 1300):
        if found.reference_is_due(taken, step * 512):
            due, taken = [*due, step], step * 512
    assert due == [400, 800, 1200]
    assert not found.reference_is_due(0, 401 * 512) and found.reference_is_due(0, 416 * 512), "made up for"
    never = compose(["experiment=grpo"]).config.grpo
    assert not any(never.reference_is_due(0, step * 512) for step in range(100))


@pytest.mark.parametrize(("every", "nearest"), [(1, 6), (7, 6), (10, 12)])
def test_a_replacement_within_a_batch_is_refused(corpus: list[str], every: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"reference_every={every} must be a multiple of the 6 .* use {nearest},"):
        policy_config(corpus, "grpo.minibatches=2", "grpo.epochs=3", f"grpo.reference_every={every}")
