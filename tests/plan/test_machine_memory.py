"""Sizes that no machine holds are refused at once; the least that is compared never exceeds what a rank holds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from fp8moe.__main__ import main
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.errors import ConfigError
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.plan import machine_memory
from fp8moe.plan.fit import check_fits
from fp8moe.plan.teacher import TeacherModel, with_teacher
from fp8moe.train.build import empty_model
from fp8moe.train.config import stages_of
from fp8moe.train.distill_config import DistillConfig
from fp8moe.train.memory import expected_bytes, replicas_of
from tests.train.runs import SMALL, configured, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_least_is_what_a_rank_holds(precision: str, corpus: list[str]) -> None:
    config = configured(corpus, f"precision={precision}", "optimizer.sharding=none")
    dispatcher = LocalDispatcher(config.model.experts.num_experts)
    model = empty_model(config, 0, stages_of(config), dispatcher, torch.device("meta"))
    parameters, need = machine_memory.least_of_rank(config)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    held = sum(expected_bytes(model, config.optimizer, replicas_of(config)).values())
    assert 0.98 * held < need <= held  # norms and routers are FP32 throughout


def test_a_reference_and_a_teacher_count(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes a parameter more of GRPO with a reference; a teacher's weights whole."""
    policy = configured(
        ["data=problems"], "precision=bf16", "optimizer.sharding=none", "grpo.kl=0", "batch.sequences=512"
    )
    parameters, need = machine_memory.least_of_rank(policy)
    with_reference = dataclasses.replace(policy, grpo=dataclasses.replace(policy.grpo, kl=0.1))
    assert machine_memory.least_of_rank(with_reference)[1] == need + 4 * parameters
    student = configured(corpus, "precision=bf16", "distill.teacher=a")
    teacher = TeacherModel(student.model, student.recipe)
    unplanned = dataclasses.replace(student, distill=DistillConfig())
    least = machine_memory.least_of_rank(unplanned)[1] + 2 * parameters
    assert machine_memory.least_of_rank(with_teacher(student, teacher))[1] == pytest.approx(least, rel=0.01)
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: int(0.98 * least))
    check_fits(unplanned, 1)
    with pytest.raises(ConfigError, match="this machine has"):
        check_fits(student, 1, teacher)


def test_a_teacher_counts_before_anything_starts(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command opens the teacher's settings for its own check."""
    theirs = compose([*SMALL, *corpus, "model.dim=512", f"checkpoint.path={tmp_path / 'saved'}"])
    (tmp_path / "config.yaml").write_text(as_yaml(theirs.config))
    alone = configured(corpus)
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: int(machine_memory.least_of_rank(alone)[1] + 1000))
    run = tmp_path / "run"
    check_fits(alone, 1)
    assert main(["train", *SMALL, *corpus, f"run_dir={run}", f"distill.teacher={tmp_path}"]) == 2
    assert "and this machine has" in capsys.readouterr().err and not run.exists()


def test_a_machine_that_is_too_small(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(corpus, world_size=2)
    _, need = machine_memory.least_of_rank(config)
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: int(2 * need))
    machine_memory.check_host(config, 1)
    machine_memory.check_host(config, 2)
    with pytest.raises(ConfigError, match=r"3 processes on this machine need at least .* GB .* and this machine has"):
        machine_memory.check_host(config, 3)
    unsharded = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, sharding="none"))
    with pytest.raises(ConfigError, match=r": use optimizer\.sharding=zero1, or a smaller model"):
        machine_memory.check_host(unsharded, 4)
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: None)
    machine_memory.check_host(config, 10**9)


def test_a_limit_of_the_processes_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [tmp_path / "one", tmp_path / "other"]
    monkeypatch.setattr(machine_memory, "CGROUP_LIMITS", limits)
    whole = machine_memory.host_bytes()
    assert whole is not None and whole > 2**28
    limits[0].write_text("max\n")
    limits[1].write_text("4096\n")
    assert machine_memory.host_bytes() == 4096


def test_the_command_refuses_at_once_and_makes_nothing(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8moe.cli.train.launch", None)  # not reached
    run = tmp_path / "run"
    for words, says in (
        (["model.dense_hidden=1048576", "model.dim=1048576"], "a rank needs at least"),
        (["model.dim=1e12"], "model.dim=1000000000000"),
        (["model.num_layers=1e12"], "model.num_layers=1000000000000"),
        (["--nproc", "2", "model.experts.hidden=1048576", "model.num_layers=4096"], "2 processes on this machine need"),
    ):
        begin = time.process_time()
        assert main(["train", *SMALL, *corpus, f"run_dir={run}", *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1 and time.process_time() - begin < 2.0, err
    assert not run.exists()


def test_plan_off_skips_it(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: 1)
    check_fits(configured(corpus, "plan=off"), 1)
    with pytest.raises(ConfigError, match="this machine has"):
        check_fits(configured(corpus), 1)
