"""The corpus that the runs of these tests read, written once."""

from __future__ import annotations

import pytest

from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
