"""Documents counted: empty ones and exact duplicates, those in several pieces as well."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fp8moe.cli import tokenize
from fp8moe.data import readers
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.intake import Intake
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Short documents, equal ones among them, and long ones in several pieces, the first and the last equal."""
    monkeypatch.setattr(readers, "PIECE_CHARS", 50)
    (tmp_path / "in").mkdir()
    lines = ["one", "two", "", "one", "One", "two", "one\n"]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    for name, text in {
        "b": "long line\n" * 20,
        "c": "long line\n" * 19 + "other",
        "d": "long line\n" * 20,
        "e": "",
    }.items():
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    return tmp_path / "in"


def documents_of(prefix: Path) -> list[str]:
    stored, strings = IndexedDataset(prefix), token_byte_strings(load_tokenizer(f"{prefix}.tokenizer.json"))
    ends = stored.document_offsets.tolist()
    return [
        b"".join(strings[one] for one in stored.tokens[start : end - 1]).decode()
        for start, end in itertools.pairwise(ends)
    ]


LONG, OTHER = "long line\n" * 20, "long line\n" * 19 + "other"


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        ([], ["one", "two", "one", "One", "two", "one\n", LONG, OTHER, LONG], "left out: 2 empty documents\n"),
        (["--drop-duplicates"], ["one", "two", "One", "one\n", LONG, OTHER], "2 empty documents, 3 exact duplicates"),
    ],
)
def test_what_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: list[str], said: str
) -> None:
    command = ["--input", str(folder), "--output", str(tmp_path / "x"), "--vocab-size", "300", *options]
    assert tokenize.main(command) == 0
    assert documents_of(tmp_path / "x") == expected
    out = capsys.readouterr().out
    tokens = len(IndexedDataset(tmp_path / "x").tokens)
    ratio = len("".join(expected).encode()) / (tokens - len(expected))
    assert said in out and f"{tokens} tokens, {ratio:.3f} bytes/token" in out


def test_a_known_duplicate_is_not_encoded(folder: Path) -> None:
    intake = Intake([folder / "a.jsonl"], "text", True)
    assert [text for text, _ in intake.pieces()] == ["one", "two", "One", "one\n"]
    assert (intake.empty, intake.duplicates) == (1, 2)
    assert [intake.is_dropped() for _ in range(4)] == [False] * 4
