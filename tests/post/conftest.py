"""A small corpus with its tokenizer, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(Path(tmp_path_factory.mktemp("corpus")))
