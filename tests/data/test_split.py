"""One document is enough: its end is held out, and no token is in both parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fp8moe.data.build import open_data
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.data.split import split, split_documents
from fp8moe.errors import DataError

MakeTokens = Callable[..., IndexedDataset]


def parts_of(source: IndexedDataset, share: float, seq_len: int) -> tuple[list[int], list[int]]:
    divided, train, validation = split(source, share, seq_len)
    offsets = divided.document_offsets
    taken = [
        np.concatenate([divided.tokens[offsets[i] : offsets[i + 1]] for i in part]) for part in (train, validation)
    ]
    return taken[0].tolist(), taken[1].tolist()


@pytest.mark.parametrize(
    ("tokens", "share", "seq_len", "held_out"),
    [
        (1000, 0.025, 8, 25),
        (1001, 0.025, 8, 26),
        (1000, 0.001, 8, 9),
        (18, 0.5, 8, 9),
        (19, 0.5, 8, 10),
        (19, 0.5, 6, 10),
    ],
)
def test_the_last_tokens_are_held_out(
    make_tokens: MakeTokens, tokens: int, share: float, seq_len: int, held_out: int
) -> None:
    source = make_tokens([list(range(tokens)), []], vocab_size=2000)
    train, validation = parts_of(source, share, seq_len)
    assert train + validation == list(range(tokens)) and len(validation) == held_out


def test_several_documents_are_split_by_documents(make_tokens: MakeTokens) -> None:
    source = make_tokens([[i] * 3 for i in range(50)])
    divided, *parts = split(source, 0.1, 8)
    assert divided is source
    assert [part.tolist() for part in parts] == [part.tolist() for part in split_documents(source, 0.1)]


def test_a_text_too_short_for_two_samples_is_one_sentence(make_tokens: MakeTokens) -> None:
    with pytest.raises(
        DataError, match=r"has 17 tokens in 1 document, .* \(seq_len \+ 1\) = 18: use seq_len=7 or add t"
    ):
        split(make_tokens([[1] * 17]), 0.1, 8)
    split(make_tokens([[1] * 17]), 0.1, 7)
    with pytest.raises(DataError, match=r"has 3 tokens .* = 18: add text"):
        split(make_tokens([[1] * 3]), 0.1, 8)


def test_a_run_reads_one_document(make_tokens: MakeTokens, tmp_path: Path) -> None:
    make_tokens([list(range(800))], name="book")

    def opened(share: float) -> tuple[set[int], set[int], str]:
        config = DataConfig(
            source="indexed", paths=(str(tmp_path / "book"),), vocab_size=1000, validation_share=share,
            cache_dir=str(tmp_path / "c"),
        )  # fmt: skip
        data = open_data(config, seq_len=8, seed=1)
        seen = [
            set(part.batch(range(len(part))).inputs_BS.flatten().tolist()) for part in (data.train, data.validation)
        ]
        return seen[0], seen[1], data.train.content()

    train, validation, content = opened(0.1)
    assert max(train) < 720 <= min(validation) and len(train) > 700 and len(validation) > 70
    train, validation, other = opened(0.2)  # the same cache: the order of the other share must not be taken
    assert max(train) < 640 <= min(validation) and content != other
