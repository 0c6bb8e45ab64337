"""Two real runs on the small grammar, in FP8 and BF16, that the tests of the report read; and their pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fp8moe.cli.compose import as_yaml, compose
from fp8moe.generate.samples import last_lines
from fp8moe.report.page import write_report
from fp8moe.train.loop import train
from tests.train.runs import configured, write_corpus

SETTINGS = (
    *("steps=24", "batch.micro_batch=8", "validation.every=8", "checkpoint.every=12", "validation.completions=2"),
    *("logging.fp8_every=8", "logging.experts_every=4"),
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of a run in FP8, with a trace, and of one in BF16."""
    corpus, folder = write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("runs")
    for name, settings in (("fp8", ("profile=true",)), ("bf16", ("optimizer.schedule.peak=2e-3",))):
        config = configured(corpus, *SETTINGS, f"precision={name}", *settings, f"run_dir={folder / name}")
        train(config, as_yaml, last_lines=last_lines)
    return [folder / "fp8", folder / "bf16"]


@pytest.fixture(scope="session")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, and of both."""
    folder, defaults = tmp_path_factory.mktemp("pages"), lambda: yaml.safe_load(compose([]).text)
    found = {"one": folder / "one.html", "two": folder / "two.html"}
    write_report(runs[:1], found["one"], defaults)
    write_report(runs, found["two"], defaults)
    return found
