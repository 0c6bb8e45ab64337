"""`fp8moe data`: the card of token files against counts made by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fp8moe.__main__ import main
from fp8moe.data import card as module
from fp8moe.data.card import card_of, histogram
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
    assert main(["data", str(prefix), "--samples", "1", "--size", "3", "--tokenizer", f"{prefix}.tokenizer.json"]) == 0
    assert "sample 0, 4 tokens:\n" in capsys.readouterr().out
    assert main(["data", str(prefix), "--samples", "0"]) == 0
    assert "sample" not in capsys.readouterr().out
    Path(f"{prefix}.tokenizer.json").unlink()
    assert main(["data", str(prefix), "--size", "4"]) == 0
    out = capsys.readouterr().out
    assert "no tokenizer beside it" in out
    shown = [
        int(word) for line in out.splitlines() if "predicted" in line for word in line.split("predicted")[1].split()[1:]
    ]
    assert len(shown) == 10 and set(shown) <= set(source.tokens.tolist())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{none}"], 3, "none.idx does not exist"),
        (["{t}", "--samples", "-1"], 2, "--samples -1 must be at least 0: use 0 for none"),
        (["{t}", "--size", "0"], 2, "--size 0 must be at least 1"),
        (["{t}", "--tokenizer", "{none}"], 3, "none does not exist"),
        (["{t}", "--fim-rate", "1.5"], 2, "--fim-rate 1.5 must be at least 0 and at most 1"),
        (["{t}", "--fim-rate", "nan"], 2, "--fim-rate nan must be at least 0 and at most 1"),
        (["{t}", "--seed", "-1"], 2, "--seed -1 must be at least 0"),
        (
            ["{t}", "--fim-tokens", "<|fim_prefiks|>", "<|fim_suffix|>", "<|fim_middle|>"],
            3,
            "no token '<|fim_prefiks|>', which data.fim_tokens names: the nearest that it has is '<|fim_prefix|>'",
        ),
        (["{bare}", "--fim-rate", "0.5"], 2, "--fim-rate 0.5 needs a tokenizer and {bare} has none beside it"),
    ],
)
def test_bad_input(
    prefix: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    with IndexedWriter(prefix.parent / "bare", 270) as writer:
        writer.write(np.arange(9))
        writer.end_document()
    places = {"{t}": str(prefix), "{none}": str(prefix.parent / "none"), "{bare}": str(prefix.parent / "bare")}
    for name, place in places.items():
        arguments, said = [word.replace(name, place) for word in arguments], said.replace(name, place)
    assert main(["data", *arguments]) == code
    out, error = capsys.readouterr()
    assert not out and said in error and error.count("\n") == 1 and error.startswith("fp8moe data: ")


LINE = re.compile(
    r"  (?:document (\d+), tokens? ([\d,]+)(?:-([\d,]+))?|padding)\s+(prefix |suffix |middle |)\s*"
    r"(not predicted|predicted) +([\d,]+)(?:  (.*))?"
)


def lines_of(out: str) -> list[tuple[str | None, ...]]:
    """(document, first token, last, part, mask, tokens, text) of each line of the samples, which follow `sample`."""
    found = [LINE.fullmatch(line) for line in out.partition("sample 0")[2].splitlines() if line.startswith("  ")]
    assert found and all(found)
    return [one.groups() for one in found if one]


def test_samples_show_borders_padding_and_what_is_predicted(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(prefix), "--size", "30", "--samples", "9", "--packing", "documents"]
    assert main([*words, "--document-mask"]) == 0
    rows, seen = lines_of(capsys.readouterr().out), {}
    for before, row in zip([None, *rows], rows, strict=False):
        document, first, last, part, mask, count, text = row
        assert not part
        if document is None:
            assert mask == "not predicted" and before is not None and not text
            continue
        assert int(count) == int(last or first) - int(first) + 1
        assert mask == ("not predicted" if int(first) == 0 else "predicted"), "a document's first token alone"
        seen[int(document)] = seen.get(int(document), "") + text
    spoken = {n: text.replace('""', "").replace('" "', " ").replace('"', "") for n, text in seen.items()}
    assert {n: "".join(text.split()) for n, text in spoken.items()} == {
        n: "".join(text.split()) + "<|endoftext|>" for n, text in enumerate(TEXTS)
    }
    places = sum(int(row[5]) for row in rows)
    assert places % 31 == 0 and places - sum(int(row[5]) for row in rows if row[0] is None) == len(
        IndexedDataset(prefix).tokens
    )
    assert main(words) == 0
    rows = lines_of(capsys.readouterr().out)
    assert sum(row[4] == "not predicted" and row[0] is not None for row in rows) == places // 31, (
        "a sample's first alone"
    )


def test_samples_name_the_parts_of_fill_in_the_middle(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(prefix), "--size", "60", "--samples", "9", "--packing", "documents", "--fim-rate", "1"]
    assert main([*words, "--document-mask"]) == 0
    parts: dict[int, dict[str, str]] = {}
    for document, _, _, part, _, _, text in lines_of(capsys.readouterr().out):
        if document is not None:
            part = (part or "").strip()
            of = parts.setdefault(int(document), {})
            of[part] = of.get(part, "") + (text or "").replace('"', "")
    sentinels = {"prefix": "<|fim_prefix|>", "suffix": "<|fim_suffix|>", "middle": "<|fim_middle|>"}
    for number, text in enumerate(TEXTS):
        if not text:
            assert parts[number] == {"": "<|endoftext|>"}, "a document without text stays"
            continue
        assert list(parts[number]) == list(sentinels)
        said = {}
        for name, sentinel in sentinels.items():
            assert parts[number][name].startswith(sentinel)
            said[name] = parts[number][name].removeprefix(sentinel)
        assert said["middle"].endswith("<|endoftext|>")
        whole = said["prefix"] + said["middle"].removesuffix("<|endoftext|>") + said["suffix"]
        assert "".join(whole.split()) == "".join(text.split())


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
    (tmp_path / "users.jinja").write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert main([*words, "--chat-template", str(tmp_path / "users.jinja")]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 3 conversations, 1 without an answer, {tmp_path}/users.jinja\n" in out
    assert f"\n{tmp_path}/users.jinja writes nothing of the answers of 2 conversations\n" in out
    assert main(words) == 2
    said = (
        "has no chat template, neither chat_template.jinja nor in tokenizer_config.json: use --chat-template plain, or"
    )
    assert said in capsys.readouterr().err
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    for more in (words[2:], []):
        assert main(["data", str(tmp_path / "text.jsonl"), *more]) == 3
        assert "text.jsonl line 1 has no messages, it has text: write " in capsys.readouterr().err
    assert main(words[:2]) == 2 and "needs a tokenizer: use --tokenizer" in capsys.readouterr().err
