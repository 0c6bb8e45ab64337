"""The short form of `make test-faults`, and that its table tells a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import Outcome, put
from tests.faults.kinds import FAULTS, Fault
from tests.train.runs import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.short], ids=lambda fault: fault.name)
def test_a_run_survives(fault: Fault, folder: Path, corpus: list[str]) -> None:
    outcome = put(fault, fault.short, 1, folder, corpus)
    assert outcome.trials == fault.short and outcome.lost == []


def test_the_table_tells_a_loss(tmp_path: Path) -> None:
    fault = Fault("every second", lambda rng, folder, corpus: "a step" if folder.name.endswith("1") else None, 4, 2)
    outcome = put(fault, 2, 0, tmp_path, [])
    assert outcome.lost == ["trial 1: a step"] and outcome.row.split()[2:4] == ["2", "1"]
    assert outcome.row.endswith("trial 1: a step (1 in all)")
    assert Outcome("none", 3).row.endswith("nothing")
