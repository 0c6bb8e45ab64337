"""A run that these tests use: trained for a few steps on a small grammar, with an MTP module and an average."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.cli.compose import as_yaml
from fp8moe.generate.samples import last_lines
from fp8moe.train.loop import train
from tests.train.runs import configured, write_corpus

SETTINGS = ("steps=12", "batch.micro_batch=8", "optimizer.schedule.peak=2e-2", "precision=fp32", "ema.decay=0.9")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """The directory of a run."""
    folder = tmp_path_factory.mktemp("run")
    train(configured(corpus, *SETTINGS, f"run_dir={folder}"), as_yaml, last_lines)
    return folder
