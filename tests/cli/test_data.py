"""`fp8moe data`: the card of token files against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fp8moe.__main__ import main
from fp8moe.data import card as module
from fp8moe.data.card import card_of, histogram, samples_of
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.tokenizer import save_tokenizer, train_tokenizer
from tests.data.chats import TURNS, chat_tokenizer, exchange, write_rows

TEXTS = ["one é", "two " * 9, "", "one é", "two " * 9, "one é", "x"]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["one two x"], 270)
    with IndexedWriter(tmp_path / "t", 270) as writer:
        for text in TEXTS:
            writer.write(np.array([*tokenizer.encode(text).ids, 0]))
            writer.end_document()
    save_tokenizer(tokenizer, tmp_path / "t.tokenizer.json")
    return tmp_path / "t"


def test_the_figures(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = IndexedDataset(prefix)
    ids = source.tokens.tolist()
    for chunk in (5, 1 << 22):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        card = card_of(source, np.arange(270), 0)
        assert (card.documents, card.empty, card.duplicates, card.tokens) == (7, 1, 3, len(ids))
        assert card.num_bytes == sum(ids) and card.used_ids == len(set(ids)) and card.largest_id == max(ids)
    assert card_of(source, None, 0).num_bytes is None
    assert card_of(source, None, None).empty == 0, "an end-of-text that nobody knows is a token like any other"


def test_samples(prefix: Path) -> None:
    source = IndexedDataset(prefix)
    starts = source.document_offsets.tolist()
    samples = samples_of(source, 5, 9)
    assert samples[0].start == 0 and samples[-1].start == len(source.tokens) - 9 and len(samples) == 5
    for sample in samples:
        assert sample.ids.tolist() == source.tokens[sample.start : sample.start + 9].tolist()
        inside = range(sample.start, sample.start + 9)
        assert sample.documents == [(at - sample.start, n) for n, at in enumerate(starts[:-1]) if at in inside]
        assert starts[sample.document] <= sample.start < starts[sample.document + 1]
    assert len(samples_of(source, 3, 10**6)) == 1


def test_the_histogram() -> None:
    lines = histogram(np.array([0, 1, 2, 3, 3, 4, 7, 8, 1500]), width=8)
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255",
                                        "256-511", "512-1,023", "1,024-2,047"]  # fmt: skip
    assert [int(row[1]) for row in rows] == [1, 1, 3, 2, 1, 0, 0, 0, 0, 0, 0, 1]
    assert rows[2][3] == "#" * 8 and len(rows[3][3]) == 5
    assert [line.split()[0] for line in histogram(np.array([9, 9]))] == ["8-15"]


def test_the_command(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for path in (str(prefix), f"{prefix}.bin", f"{prefix}.idx"):
        assert main(["data", path, "--samples", "1", "--size", "100"]) == 0
        said[path] = capsys.readouterr().out
    (out,) = set(said.values())
    source = IndexedDataset(prefix)
    size = len("".join(TEXTS).encode())
    assert f"{size:,} bytes of text, {size / (len(source.tokens) - 7):.3f} bytes/token" in out
    assert "1 documents are empty, 3 are exact duplicates" in out and "7 documents" in out
    assert '[document 0 begins] "one é"' in out and '[document 6 begins] "x"' in out
    assert main(["data", str(prefix), "--samples", "1", "--size", "3", "--tokenizer", f"{prefix}.tokenizer.json"]) == 0
    assert "tokens 0 to 2:\n" in capsys.readouterr().out
    assert main(["data", str(prefix), "--samples", "0"]) == 0
    assert "begins" not in capsys.readouterr().out
    Path(f"{prefix}.tokenizer.json").unlink()
    assert main(["data", str(prefix), "--size", "4"]) == 0
    out = capsys.readouterr().out
    assert "no tokenizer beside it" in out and " ".join(map(str, source.tokens[:4].tolist())) in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{none}"], 3, "none.idx does not exist"),
        (["{t}", "--samples", "-1"], 2, "--samples -1 must be at least 0: use 0 for none"),
        (["{t}", "--size", "0"], 2, "--size 0 must be at least 1"),
        (["{t}", "--tokenizer", "{none}"], 3, "none does not exist"),
    ],
)
def test_bad_input(
    prefix: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    words = [word.replace("{t}", str(prefix)).replace("{none}", str(prefix.parent / "none")) for word in arguments]
    assert main(["data", *words]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("fp8moe data: ")


def test_conversations_are_shown_with_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": TURNS}, exchange("a", "b"), {"messages": TURNS[:2]}]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    chat_tokenizer().save(str(tmp_path / "tokenizer.json"))
    words = ["data", str(path), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*words, "--chat-template", "chatml", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 3 conversations, 1 without an answer, the chat template chatml\n" in out
    assert '  [given] "<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\na b<|im_end|>\\n<|im_sta' in out
    assert '  [learned] "c d<|im_end|>"\n  [given] "\\n<|im_start|>user' in out and "line 2" not in out
    assert main(words) == 2 and "has no chat template" in capsys.readouterr().err
    assert main(words[:2]) == 2 and "needs a tokenizer: use --tokenizer" in capsys.readouterr().err
