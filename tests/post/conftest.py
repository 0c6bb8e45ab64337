"""A small corpus with its tokenizer, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8moe.generate.text import Vocabulary
from tests.post.runs import policy_config
from tests.train.runs import write_corpus

if TYPE_CHECKING:
    from tests.post.distill.served import Served
    from tests.post.rollouts_served import Rollouts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(Path(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def server(corpus: list[str]) -> Iterator[tuple[Served, Rollouts]]:
    """A rollout server for the tests of a file."""
    from tests.post.rollouts_served import SMALL, rollouts_served

    config = policy_config(corpus, *SMALL)
    assert config.data.tokenizer is not None
    num_ids = Vocabulary(Path(config.data.tokenizer), config.model.vocab_size).num_ids
    with rollouts_served(config, num_ids) as found:
        yield found
