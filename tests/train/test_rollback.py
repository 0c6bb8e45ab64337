"""A NaN anywhere in a run: no weight moves, nothing is saved, and training goes on from the last good checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fp8moe.errors import NonFiniteError
from fp8moe.train import checkpoint, loop
from fp8moe.train import step as step_module
from fp8moe.train.checkpoint import saver as saver_module
from fp8moe.train.loop import run_to_end
from fp8moe.train.run import Run
from fp8moe.train.run_state import save_checkpoint
from fp8moe.train.step import train_step
from fp8moe.train.validation import ValidationReport
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, weights_of

SAVING = ("checkpoint.every=1", "checkpoint.keep=2", "precision=bf16")
LAYOUTS = [
    ("parallel.ep=2",),
    ("parallel.ep=1", "optimizer.sharding=none"),
    ("parallel.schedule=dualpipe", "parallel.pp=2", "batch.micro_batch=1"),
]


@pytest.fixture(autouse=True)
def original_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test in this process puts in place of the step goes when it ends."""
    monkeypatch.setattr(loop, "train_step", train_step)


def poison_gradient(run: Run) -> None:
    run.model.main_grads.dense[-1] = math.nan


def poison_bias(run: Run) -> None:
    next(iter(run.routers().values())).bias_E[1] = math.nan


def poison_experts(run: Run) -> None:
    with torch.no_grad():
        run.model.get_parameter("blocks.1.moe.experts.gate_up.weight")[0, 0, 0] = math.nan


def poison_held(run: Run, kind: str) -> None:
    run.optimizer.held["norm.weight"][0].tensors[kind][3] = math.nan


def before_step(step: int, of_rank: int, poison: Callable[[Run], None]) -> None:
    """From now on the loop's steps with that number, however often they are done, begin with `poison` on that rank."""
    original = train_step

    def poisoned(run: Run, **options: Any) -> Any:
        if run.step + 1 == step and run.mesh.rank == of_rank:
            run.saver.wait_copied()  # the checkpoint before is not what is poisoned
            poison(run)
        return original(run, **options)

    loop.train_step = poisoned


def once(poison: Callable[[Run], None]) -> Callable[[Run], None]:
    done: list[bool] = []

    def first(run: Run) -> None:
        if not done:
            done.append(True)
            poison(run)

    return first


def skipped_step(settings: list[str], where: str) -> tuple[list[str], Any, Any]:
    """Names of weights that a step with a NaN on rank 1 moved; its report; whether the next step counted."""
    run = built(configured(settings, world_size=2))
    train_step(run)
    before, held = weights_of(run), {n: [t.clone() for o in r for t in o.tensors.values()] for n, r in
                                     run.optimizer.held.items()}  # fmt: skip
    passes = step_module.train_passes
    if run.mesh.rank == 1 and where == "gradient":
        step_module.train_passes = lambda run, *rest: (poison_gradient(run), passes(run, *rest))[1]
    elif run.mesh.rank == 1:
        poison_bias(run)
    report = train_step(run)
    step_module.train_passes = passes
    moved = differing(before, weights_of(run))
    for name, ranges in run.optimizer.held.items():
        now = [tensor for one in ranges for tensor in one.tensors.values()]
        moved += [name for old, new in zip(held[name], now, strict=True) if not torch.equal(old, new)]
    problem = run.guard.problem
    after = train_step(run) if where == "gradient" else None
    return moved, (report.skipped, report.skipped_samples, run.guard.skipped, problem), after and after.skipped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["gradient", "bias"])
def test_a_nan_on_one_rank_moves_no_weight_on_any(corpus: list[str], layout: tuple[str, ...], where: str) -> None:
    first, second = run_ranks(skipped_step, 2, [*corpus, "precision=bf16", *layout], where)
    for moved, (skipped, samples, number, problem), next_skipped in (first, second):
        assert moved == [] and skipped and samples == (8, 15) and number == 1
        if where == "gradient":
            assert problem is None and next_skipped is False
        else:
            assert problem == "bias.blocks.1.moe.router is not finite on rank 1 in step 2"


def poisoned_run(settings: list[str], world_size: int) -> tuple[Any, ...]:
    """A run whose rank 1 gets a NaN into an expert before step 4, once -> how it ended."""
    run = built(configured(settings, world_size=world_size))
    before_step(4, world_size - 1, once(poison_experts))
    try:
        run_to_end(run, time.perf_counter())
    except NonFiniteError as error:
        return str(error), error.exit_code
    return run.step, run.sampler.consumed, run.guard.skipped, run.guard.rollbacks


def good_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there, all of whose numbers must be finite."""
    paths = checkpoint.complete(run_dir / "checkpoints")
    for path in paths:
        for file in Path(str(path)).glob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point()), file
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_a_nan_in_one_ranks_experts_costs_its_data_and_nothing_else(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, *SAVING, "parallel.ep=2", "steps=6", f"run_dir={tmp_path}"]
    # Steps 4, 5, 6 were skipped, with samples 24 to 47; back to step 3, three steps more.
    assert run_ranks(poisoned_run, 2, settings, 2) == [(6, 72, 3, 1)] * 2
    assert good_steps(tmp_path) == [5, 6]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] is None or record["skipped"] for record in records] == [False] * 6
    assert (records[3]["rolled_back_from"], records[3]["passed_over"]) == (6, [24, 47])
    assert records[3]["consumed_samples"] == 56 and "passed_over" not in records[4]
    log = (tmp_path / "logs" / "rank-0.log").read_text() if (tmp_path / "logs" / "rank-0.log").exists() else ""
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rollbacks"], summary["skipped_steps"]) == (1, 3) and math.isfinite(summary["loss"]), log


def test_a_run_that_stops_keeps_its_good_checkpoints(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, *SAVING, "parallel.ep=2", "steps=6", f"run_dir={tmp_path}"]
    (text, code), other = run_ranks(poisoned_run, 2, [*settings, "guard.then=stop"], 2)
    assert other == (text, code) and code == 5 and text.startswith("3 consecutive steps were not finite")
    assert good_steps(tmp_path) == [2, 3]
    run = built(configured([*settings, "resume=auto", "parallel.ep=1"]))
    assert (run.step, run.sampler.consumed, run.guard.in_a_row) == (3, 24, 0)
    assert math.isfinite(run_to_end(run, time.perf_counter()).val_loss) and good_steps(tmp_path) == [5, 6]


@pytest.mark.parametrize("kind", ["master", "exp_avg"])
def test_a_nan_in_the_optimizers_state_is_named_and_not_saved(corpus: list[str], tmp_path: Path, kind: str) -> None:
    run = built(configured([*corpus, *SAVING, "steps=4", "guard.then=stop", f"run_dir={tmp_path}"]))
    before_step(3, 0, lambda run: poison_held(run, kind))
    with pytest.raises(NonFiniteError, match=r"^\w+\.norm\.weight is not finite on rank 0.* after step 3: resume from"):
        run_to_end(run, time.perf_counter())
    assert good_steps(tmp_path) == [1, 2]


def refused_late(settings: list[str]) -> tuple[int, ...]:
    """An infinite second moment, which no loss shows, on rank 1, whose saver learns last that its state is refused."""
    run = built(configured(settings, world_size=2))
    describe = saver_module.described

    def late(of_ranks: list[list[str]]) -> str | None:
        if any(of_ranks) and run.mesh.rank == 1:
            time.sleep(0.7)
        return describe(of_ranks)

    def poison(run: Run) -> None:
        run.optimizer.held["norm.weight"][0].tensors["exp_avg_sq"][3] = math.inf

    before_step(5, 1, once(poison))
    saver_module.described = late
    try:
        run_to_end(run, time.perf_counter())
    finally:
        saver_module.described = describe
    return run.step, run.guard.skipped, run.guard.rollbacks, run.sampler.consumed


def test_all_ranks_go_back_at_one_step_from_a_state_that_is_refused(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, "precision=bf16", "checkpoint.every=3", "checkpoint.keep=99", "optimizer.sharding=none"]
    found = run_ranks(
        refused_late, 2, [*settings, "steps=12", "validation.samples=2", "batch.micro_batch=1", f"run_dir={tmp_path}"]
    )
    assert found[0] == found[1] and found[0][:3] == (12, 0, 1)
    assert good_steps(tmp_path) == [3, 4, 6, 9, 12], "the refused one is owed behind the next step"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[3]["passed_over"][0] == 24 and records[3]["rolled_back_from"] >= 7, (
        "the step after the save at least"
    )


def test_the_same_nan_again_ends_the_run_after_two_rollbacks(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured([*corpus, *SAVING, "steps=6", f"run_dir={tmp_path}"]))
    before_step(4, 0, poison_bias)
    end = r"^bias\.blocks\.1\.moe\.router is not finite on rank 0 in step 4, and 2 rollbacks to .*step-3 brought no"
    with pytest.raises(NonFiniteError, match=end):
        run_to_end(run, time.perf_counter())
    assert (run.guard.rollbacks, run.guard.skipped, run.sampler.consumed) == (2, 3, 48)
    assert good_steps(tmp_path) == [2, 3]


def test_a_spike_goes_back_and_passes_over_its_data(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8moe.train.guard.WINDOW", 3)
    run = built(configured([*corpus, *SAVING, "steps=6", "guard.spike_sigma=6.0", f"run_dir={tmp_path}"]))
    losses, passes = [2.0, 2.1, 2.0, 2.1, 9.0, 2.0, 2.1], step_module.forward_backward

    def chosen(*arguments: Any) -> step_module.Losses:
        passes(*arguments)
        return step_module.Losses(losses.pop(0), 0.0, 0.0)

    monkeypatch.setattr(step_module, "forward_backward", chosen)
    run_to_end(run, time.perf_counter())
    assert losses == [] and run.sampler.consumed == 7 * 8 and run.guard.rollbacks == 1
    line = f"goes on from {tmp_path / 'checkpoints' / 'step-4'}, behind samples 32 to 39"
    assert capsys.readouterr().out.count(line) == 1


def test_without_a_checkpoint_the_run_ends(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured([*corpus, "precision=bf16", f"run_dir={tmp_path}"]))
    before_step(2, 0, poison_bias)
    with pytest.raises(
        NonFiniteError, match="in step 2, and there is no checkpoint to go back to: start anew"
    ) as caught:
        run_to_end(run, time.perf_counter())
    assert caught.value.exit_code == 5 and good_steps(tmp_path) == []


def test_a_checkpoint_that_a_skipped_step_owes_is_written_behind_the_next(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = step_module.train_passes
    run = built(configured([*corpus, "precision=bf16", "checkpoint.every=4", "steps=6", f"run_dir={tmp_path}"]))

    def poisoned(run: Run, *rest: Any) -> Any:
        if run.step + 1 == 4:
            poison_gradient(run)
        return passes(run, *rest)

    monkeypatch.setattr(step_module, "train_passes", poisoned)
    run_to_end(run, time.perf_counter())
    assert good_steps(tmp_path) == [5, 6] and run.guard.skipped == 1


@pytest.mark.parametrize("what", ["step", "validation"])
def test_a_run_whose_end_is_not_finite_does_not_succeed(
    corpus: list[str], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = step_module.train_passes
    run = built(configured([*corpus, *SAVING, "steps=3", f"run_dir={tmp_path}"]))

    def poisoned(run: Run, *rest: Any) -> Any:
        if run.step + 1 == 3:
            poison_gradient(run)
        return passes(run, *rest)

    if what == "step":
        monkeypatch.setattr(step_module, "train_passes", poisoned)
        end = "^step 3, the run's last, was skipped, so it is not saved: resume from"
    else:
        monkeypatch.setattr(loop, "validate", lambda *given, **options: ValidationReport(math.nan, None, 1))
        end = "^the validation loss after step 3 is nan, and 2 rollbacks to .*step-2 brought no"
    with pytest.raises(NonFiniteError, match=end) as caught:
        run_to_end(run, time.perf_counter())
    assert caught.value.exit_code == 5 and good_steps(tmp_path) == [1, 2]
    assert not (tmp_path / "summary.json").exists()


def test_a_last_step_that_is_skipped_where_nothing_was_saved_is_no_reason_to_resume(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(configured([*corpus, "steps=1", f"run_dir={tmp_path}"]))
    passes = step_module.train_passes

    def poisoned(run: Run, *rest: Any) -> Any:
        poison_gradient(run)
        return passes(run, *rest)

    monkeypatch.setattr(step_module, "train_passes", poisoned)
    with pytest.raises(NonFiniteError, match=r"^step 1, the run's last, .*, and there is no checkpoint: start anew"):
        run_to_end(run, time.perf_counter())


def test_the_count_in_a_row_survives_a_resume(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured([*corpus, f"run_dir={tmp_path}"]))
    run.step, run.guard.skipped, run.guard.in_a_row = 2, 7, 2
    path = Path(str(save_checkpoint(run)))
    resumed = built(configured([*corpus, f"resume={path}"]))
    assert (resumed.guard.skipped, resumed.guard.in_a_row) == (7, 2)
    state = json.loads((path / "state.json").read_text())
    assert state.pop("skipped_in_a_row") == 2
    (path / "state.json").write_text(json.dumps(state))  # as an earlier version of this format wrote it
    assert checkpoint.read_state(path, run.config.model).skipped_in_a_row == 0
