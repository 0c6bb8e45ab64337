"""The short form of `make test-faults`, and that its table tells a loss."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.__main__ import main, put
from tests.faults.fault import Fault, NotHereError, Outcome
from tests.faults.kinds import FAULTS
from tests.train.runs import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.short], ids=lambda fault: fault.kind)
def test_a_run_survives(fault: Fault, folder: Path, corpus: list[str]) -> None:
    outcome = put(fault, fault.short, 1, folder, corpus)
    if outcome.skipped is not None:
        pytest.skip(outcome.skipped)
    assert outcome.trials == fault.short and outcome.lost == []


def test_the_table_tells_a_loss(tmp_path: Path) -> None:
    trial = lambda rng, folder, corpus: "a step" if folder.name.endswith("1") else None  # noqa: E731
    outcome = put(Fault("second", "every second", trial, 4, 2), 2, 0, tmp_path, [])
    assert outcome.lost == ["trial 1: a step"] and outcome.row.split()[2:4] == ["2", "1"]
    assert outcome.row.endswith("trial 1: a step (1 in all)")
    assert Outcome("none", 3).row.endswith("nothing")
    assert put(Fault("late", "late", trial, 4, 2), 4, 0, tmp_path, [], time.monotonic() - 1).trials == 0


def test_a_fault_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    def trial(*rest: object) -> None:
        raise NotHereError("skipped: no right to mount")

    outcome = put(Fault("disk", "a disk", trial, 4, 2), 4, 0, tmp_path, [])
    assert outcome.trials == 0 and outcome.row.endswith("skipped: no right to mount")


def test_a_kind_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kinds", "save,flood"])
    assert "--kinds flood: use save, corrupt, signal" in capsys.readouterr().err
