"""Who is named a straggler, and who is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fp8moe.cli.compose import as_yaml
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.place import RankPlace, remember
from fp8moe.train import stragglers as module
from fp8moe.train.loop import train
from fp8moe.train.metrics import StepReport, StepSeconds
from fp8moe.train.stragglers import Slowest, Stragglers
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

REPORT = StepReport(
    step=0, loss=1.0, mtp_loss=None, aux_loss=None, grad_norm=1.0, lr=1.0, skipped=False, tokens=1, consumed_samples=1,
    tokens_per_second=1.0, mfu=None, max_violation=None, fp8_saturated_share=None, fp8_underflow_share=None,
    seconds=1.0, time=StepSeconds(0.0, 0.0, 0.0, 0.0, 0.0), memory_bytes=1,
)  # fmt: skip


def noted(working: list[float], step: int, *, dp: int, pp: int = 1, monkeypatch: pytest.MonkeyPatch) -> Slowest | None:
    """What rank 0 finds when the ranks have worked so long in each of two steps."""
    mesh = Mesh(pp, dp, 1, 0)

    def summed(tensor: Any, group: Any) -> Any:
        assert tensor[0] == pytest.approx(2 * working[0]) and not tensor[1:].any()
        for rank, seconds in enumerate(working[1:], 1):
            tensor[rank] = 2 * seconds
        return tensor

    monkeypatch.setattr(module, "all_reduce", summed)
    found = Stragglers(mesh, every=2, ratio=1.5)
    time = StepSeconds(data=working[0] / 2, forward=0.0, backward=working[0] / 4, exposed_communication=99.0,
                       optimizer=working[0] / 4, checkpoint=99.0)  # fmt: skip
    assert found.note(dataclasses.replace(REPORT, step=step - 1, time=time)) is None
    return found.note(dataclasses.replace(REPORT, step=step, time=time))


def test_the_slowest_is_named_with_its_host_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = noted([1.0, 1.1, 1.9, 0.9], 8, dp=4, monkeypatch=monkeypatch)
    assert slowest is not None and slowest.is_straggler
    remember([RankPlace(f"host{rank}", 3) for rank in range(4)])
    said = str(slowest)
    remember([])
    assert said == (
        "slowest rank 2 (host2, gpu 3): +1.8 s in steps 7 to 8; it works 1.9 s a step, 1.9 x the median of ranks with "
        "the same work (1 s)"
    )
    assert (slowest.rank, slowest.behind) == (2, pytest.approx(1.8))


@pytest.mark.parametrize(
    ("working", "pp"),
    [([1.0, 1.4, 1.2, 1.0], 1), ([1.0, 1.1, 3.0, 3.1], 2), ([5.0], 1), ([1.0, 9.0], 2)],
    ids=["near", "another stage works more", "alone", "alone on each stage"],
)
def test_nobody_is_named(working: list[float], pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = noted(working, 2, dp=len(working) // pp, pp=pp, monkeypatch=monkeypatch)
    assert slowest is None if len(working) == pp else slowest is not None and not slowest.is_straggler


def compared(settings: list[str]) -> list[Slowest | None]:
    run = built(configured(settings, world_size=2))
    found = Stragglers(run.mesh, every=1)
    slow = StepSeconds(0.0, 2.0 if run.mesh.rank else 1.0, 0.0, 0.0, 0.0)
    return [found.note(dataclasses.replace(REPORT, step=step, time=slow)) for step in (1, 2)]


def test_all_ranks_learn_of_it(corpus: list[str]) -> None:
    for first, second in run_ranks(compared, 2, [*corpus, "run_dir=null"]):
        assert first is not None and first.is_straggler and str(first).startswith("slowest rank 1: +1 s in ")
        assert "2.0 x" in str(first) and "steps 1 to 1;" in str(first)
        assert second is not None and "steps 2 to 2;" in str(second)


def test_a_run_shows_and_logs_it(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {1: 2.0, 2: 1.1}
    monkeypatch.setattr(Stragglers, "note", lambda self, report: Slowest(7, seconds[report.step], 1.0, 1, report.step))
    train(configured(corpus, "steps=2", "checkpoint.at_end=false", f"run_dir={tmp_path}"), as_yaml)
    shown = capsys.readouterr().out
    assert "slowest rank 7: +1 s in steps 1 to 1; " in shown and "steps 1 to 2;" not in shown
    assert "WARNING fp8moe.train.run_log: slowest rank 7" in (tmp_path / "logs" / "rank-0.log").read_text()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["slowest_rank"] for record in records] == [7, 7]  # the figures are kept whether or not it is far
    assert [record["slowest_rank_seconds_behind"] for record in records] == [1.0, pytest.approx(0.1)]
