"""A run that these tests use as a teacher, and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.cli.compose import as_yaml
from fp8moe.train.loop import train
from tests.train.runs import configured, write_corpus


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of a few steps."""
    folder = tmp_path_factory.mktemp("teacher")
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    settings = ("steps=4", "batch.micro_batch=8", "optimizer.schedule.peak=2e-2", "precision=fp32")
    train(configured(corpus, *settings, "validation.completions=0", f"run_dir={folder}"), as_yaml)
    return folder
