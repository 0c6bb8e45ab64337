"""Python's garbage collector runs between steps, every so many, and never within one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.train import garbage
from fp8moe.train.garbage import collect_if_due, no_collection_within_steps
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from tests.train.runs import SMALL, write_corpus

THRESHOLD = 700  # new objects after which Python collects by itself


class Cycle:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_no_step_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step makes as many objects as would start a hundred collections; the cycles go at the boundaries."""
    within, collections, alive, cycles = [False], [], [], []

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(within[0])

    def step(run: Run, **words: object) -> object:
        alive.append(sum(cycle() is not None for cycle in cycles))
        within[0] = True
        kept = [[number] for number in range(100 * THRESHOLD)]
        cycles.append(weakref.ref(Cycle()))
        report = train_step(run, **words)  # type: ignore[arg-type]
        assert not gc.isenabled() and len(kept) > 1000
        within[0] = False
        return report

    monkeypatch.setattr("fp8moe.train.loop.train_step", step)
    monkeypatch.setattr(garbage, "EVERY", 2)
    corpus = write_corpus(tmp_path)
    gc.callbacks.append(watch)
    before = gc.get_threshold()
    gc.set_threshold(THRESHOLD, 10, 10)
    try:
        words = ["precision=bf16", "steps=5", "checkpoint.at_end=false", f"run_dir={tmp_path / 'run'}"]
        assert main(["train", *SMALL, *corpus, *words]) == 0
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*before)
    assert collections and not any(collections)
    assert alive == [0, 1, 0, 1, 0], "those of two steps are collected after the second"
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert [f"garbage collected after step {step}: " in log for step in range(1, 6)] == [False, True] * 2 + [False]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_it_is_as_before_after_an_error() -> None:
    with pytest.raises(ValueError, match="here"), no_collection_within_steps():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        collect_if_due(garbage.EVERY)
        raise ValueError("here")
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with no_collection_within_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
