"""Rollouts by a server: the run of the built-in generator, weights that are exported and told, stale ones, failures."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fp8moe.cli.compose import as_yaml
from fp8moe.interop.hf_model import open_model
from fp8moe.interop.stored import Stored
from fp8moe.post.endpoint import EndpointError
from fp8moe.post.grpo import Grpo
from fp8moe.post.rollouts import FOLDER
from fp8moe.train.config import TrainConfig
from fp8moe.train.json_lines import read_lines
from fp8moe.train.loop import train
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.post.distill.served import Served
from tests.post.rollouts_served import SMALL, Rollouts, built, clear, config_of, method
from tests.post.runs import policy_config

KEY = "sk-hush-0123456789"


class Whole(NamedTuple):
    folder: Path
    told: list[str]
    asked: list[tuple[int, tuple[int, ...], int]]
    paths: list[str]
    headers: list[dict[str, str]]


@pytest.fixture(autouse=True)
def forgotten(server: tuple[Served, Rollouts], whole: Whole) -> None:
    clear(*server)


@pytest.fixture(scope="module")
def whole(corpus: list[str], server: tuple[Served, Rollouts], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run by the server that nothing stopped."""
    endpoint, rollouts = server
    clear(endpoint, rollouts)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        train(config_of(corpus, endpoint.url, f"run_dir={folder}"), as_yaml, method=method())
    return Whole(folder, list(rollouts.told), list(rollouts.asked), endpoint.paths[:], endpoint.headers[:])


def records(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")[0]


TOLERANT = ("loss", "grad_norm", "entropy", "val_loss")
EQUAL = ("step", "reward", "rollouts", "rollout_weights", "groups_drawn", "groups_alike", "tokens", "consumed_samples")
EQUAL = (*EQUAL, "completion_length", "ended_share", "held_out_accuracy", "held_out_length")


def test_a_run_by_a_server_is_the_built_in_run(corpus: list[str], whole: Whole, tmp_path: Path) -> None:
    train(policy_config(corpus, *SMALL, f"run_dir={tmp_path / 'own'}"), as_yaml, method=Grpo())
    theirs = whole.folder
    ours, served = records(tmp_path / "own"), records(theirs)
    assert len(ours) == len(served) == 3 and [one["rollout_weights"] for one in served] == [0, 1, 2]
    for one, other in zip(ours, served, strict=True):
        assert {name: one.get(name) for name in EQUAL} == {name: other.get(name) for name in EQUAL}
        for name in set(TOLERANT) & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        assert 0 < other["mismatch_largest"] < 1e-4, "another program's log-probabilities of the same weights"
    assert whole.told == [str(theirs / "rollout_weights" / str(step)) for step in range(4)]
    assert set(whole.paths) == {"/v1/completions", "/update_weights_from_disk"}
    assert {headers["Authorization"] for headers in whole.headers} == {f"Bearer {KEY}"}
    assert len(whole.asked) == 3 * 16 + 2 * 2
    assert not [path for path in theirs.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    kept = {folder: sorted(path.name for path in (theirs / folder).iterdir()) for folder in ("rollout_weights", FOLDER)}
    assert kept == {"rollout_weights": ["2", "3"], FOLDER: ["samples-000002.jsonl", "samples-000003.jsonl"]}
    (newest,) = (theirs / "checkpoints").glob("step-3")
    stored, exported = Stored(newest), open_model(theirs / "rollout_weights" / "3")
    assert len(exported.parameters) > 10
    for name in exported.parameters:
        count = stored.length(name)
        assert count is not None
        values = torch.full((count,), float("nan"))
        exported.fill(name, 0, values)
        assert torch.equal(values, stored.read(name, 0, count)), name


def test_the_next_batch_is_sampled_while_updates_run(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path
) -> None:
    endpoint, rollouts = server
    settings = ("grpo.stale=2", "grpo.minibatches=2", "batch.sequences=8", "grpo.held_out_count=0", "steps=6")
    run, made = built(config_of(corpus, endpoint.url, *settings), tmp_path)
    free, waiting = threading.Event(), threading.Event()

    def before(body: dict[str, Any], number: int) -> None:
        if number >= 16:
            waiting.set()
            assert free.wait(60)

    rollouts.before = before
    found = []
    for step in range(6):
        train_step(run, next_work=made.work)
        found.append(made.figures(run).get("rollout_weights"))
        if step == 1:  # both updates of the first batch are done and the second batch is not sampled
            assert waiting.wait(60) and len(rollouts.asked) == 16
            free.set()
    assert found == [0, None, 0, None, 2, None], "each batch after the first is by weights of two steps before"
    assert [Path(one).name for one in rollouts.told] == ["0", "2"] and len(rollouts.asked) == 3 * 16
    assert [step for step, _, _ in rollouts.asked] == [0] * 32 + [2] * 16


def test_several_batches_of_one_export(corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path) -> None:
    endpoint, rollouts = server
    settings = ("grpo.refresh=2", "grpo.stale=1", "grpo.held_out_count=0", "steps=4", "grpo.prompts=2")
    run, made = built(config_of(corpus, endpoint.url, *settings, "batch.sequences=8"), tmp_path)
    found = []
    for _ in range(4):
        train_step(run, next_work=made.work)
        found.append(made.figures(run)["rollout_weights"])
    assert found == [0, 0, 2, 2] and [Path(one).name for one in rollouts.told] == ["0", "2"]


def without_time(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"seconds", "tokens_per_second", "time", "memory_bytes", "rollout_seconds", "rollout_tokens_per_second"}
    return [{name: value for name, value in one.items() if name not in timed} for one in found]


@pytest.mark.parametrize("stale", [0, 1])
def test_a_server_that_dies_within_a_batch_loses_nothing(
    stale: int, corpus: list[str], server: tuple[Served, Rollouts], whole: Whole, tmp_path: Path
) -> None:
    endpoint, rollouts = server
    settings, folder, expected = (f"grpo.stale={stale}",), whole.folder, whole.asked
    if stale:
        folder, settings = tmp_path / "whole", (*settings, "validation.every=1")
        train(config_of(corpus, endpoint.url, *settings, f"run_dir={folder}"), as_yaml, method=method())
        expected = list(rollouts.asked)
        rollouts.asked.clear()
    assert [one["rollout_weights"] for one in records(folder)] == ([0, 0, 1] if stale else [0, 1, 2])
    dead = threading.Event()

    def before(body: dict[str, Any], number: int) -> Any:
        if number == 2 + 16 + 5:
            dead.set()
        return (0, {}, b"") if dead.is_set() and body["temperature"] else None  # validations go on

    rollouts.before = before
    cut = config_of(corpus, endpoint.url, *settings, f"run_dir={tmp_path / 'cut'}")
    with pytest.raises(EndpointError) as raised:
        train(cut, as_yaml, method=method())
    assert raised.value.exit_code == 75 and "\n" not in str(raised.value)
    assert f"{endpoint.url} gave no answer in 2 tries (" in str(raised.value)
    assert f"step 1 is saved, resume={tmp_path / 'cut'} goes on" in str(raised.value)
    assert len(rollouts.asked) == 2 + 16 + 5 + 2 * stale
    with open(tmp_path / "cut" / "rollouts" / f"samples-{1 - stale:06d}.jsonl", "ab") as file:
        file.write(b'{"name": "1/')  # as a kill would leave it
    rollouts.before = lambda body, number: None
    again = config_of(corpus, endpoint.url, *settings, f"run_dir={tmp_path / 'cut'}", "resume=required")
    train(again, as_yaml, method=method())
    assert sorted(rollouts.asked) == sorted(expected), "what was drawn is not asked for twice, and by the same weights"
    assert without_time(records(tmp_path / "cut")) == without_time(records(folder))


def test_a_run_that_goes_back_forgets_what_came_after(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path
) -> None:
    endpoint, rollouts = server
    run, made = built(config_of(corpus, endpoint.url, "grpo.held_out_count=0", "grpo.refresh_keep=5"), tmp_path)
    for _ in range(3):
        train_step(run, next_work=made.work)
    run.step, run.sampler.consumed = 1, 16  # as a rollback sets them; the weights are others now
    train_step(run, next_work=made.work)
    assert [Path(one).name for one in rollouts.told] == ["0", "1", "2", "1"]
    assert sorted(path.name for path in (tmp_path / "rollout_weights").iterdir()) == ["0", "1"]
    train_step(run, next_work=made.work)
    assert [step for step, _, _ in rollouts.asked].count(2) == 32, "the weights of step 2 are others than before"


def of_ranks(config: TrainConfig, folder: str) -> list[dict[str, Any]]:
    run, made = built(config, Path(folder))
    found = []
    for _ in range(2):
        report = train_step(run, next_work=made.work)
        found.append({"loss": report.loss, "grad_norm": report.grad_norm, **made.figures(run)})
    return found


def test_ranks_share_what_the_first_one_gets(
    corpus: list[str], server: tuple[Served, Rollouts], tmp_path: Path
) -> None:
    """Ranks that share experts, and those of a pipeline."""
    endpoint, rollouts = server
    settings = ("grpo.held_out_count=0", "grpo.stale=1", "steps=2")
    (tmp_path / "one").mkdir()
    expected = of_ranks(config_of(corpus, endpoint.url, *settings), str(tmp_path / "one"))
    asked = len(rollouts.asked)
    ranks = []
    for number, layout in enumerate((("parallel.ep=2",), ("parallel.pp=2", "parallel.schedule=1f1b"))):
        config = config_of(corpus, endpoint.url, *settings, *layout, "batch.micro_batch=2", world_size=2)
        folder = tmp_path / layout[0]
        folder.mkdir()
        ranks += run_ranks(of_ranks, 2, config, str(folder))
        assert len(rollouts.asked) == (2 + number) * asked == (2 + number) * 32
    for found in ranks:
        for name in ("loss", "grad_norm", "reward", "rollout_weights", "completion_length", "groups_alike"):
            assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], rel=2e-3, abs=1e-6)
