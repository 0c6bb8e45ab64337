"""Reading text: every character kept, never more than a piece at once, and every fault named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8moe.data import textfiles
from fp8moe.data.textfiles import find_files, read_pieces
from fp8moe.errors import DataError


def test_files_are_found_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "b/c/3.JSONL", "b/skip.bin", "a.anything"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "a.anything"), str(tmp_path / "b"), str(tmp_path / "b" / "2.txt")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a.anything",
        "b/1.md",
        "b/2.txt",
        "b/c/3.JSONL",
    ]
    with pytest.raises(DataError, match="missing does not exist"):
        find_files([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 files found"):
        find_files([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    "text", ["", "one", "a\nb\n", "line\r\nline\rline\n" * 9, "x" * 300, "é🙂\n" * 60, "\ufeffa\n\n\n" * 20]
)
def test_a_text_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(textfiles, "PIECE_CHARS", 40)
    monkeypatch.setattr(textfiles, "_LINE_CHARS", 20)
    (tmp_path / "t.txt").write_bytes(text.encode())
    pieces = list(read_pieces(tmp_path / "t.txt"))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == ([False] * (len(pieces) - 1) + [True] if text else [])
    assert all(0 < len(piece) <= 60 for piece, _ in pieces)
    if text.endswith("\n"):
        assert all(piece[-1] in "\r\n" for piece, _ in pieces)


def test_json_lines(tmp_path: Path) -> None:
    texts = ["a\nb", "é\u2028\x85🙂", "", "last"]
    lines = [json.dumps({"body": text, "n": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_bytes(("\n\n".join(lines) + "\r\n").encode())
    assert list(read_pieces(tmp_path / "t.jsonl", "body")) == [(text, True) for text in texts if text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"good\nbad \xff", r"t.txt is not UTF-8 text \(byte 0xff"),
        ("t.jsonl", b'{"text": "\xff"}', r"t.jsonl is not UTF-8 text \(byte 0xff"),
        ("t.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("t.jsonl", b'{"other": "a", "b": 1}', "line 1 has no key 'text', it has b, other"),
        ("t.jsonl", b"{}", "it has none"),
        ("t.jsonl", b"[1]", "it has list"),
        ("t.jsonl", b'\n{"text": 5}', "line 2: 'text' is a int"),
        ("t.jsonl", b'{"text": "a\\ud83d"}', "line 1: character 1 is half"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_pieces(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(read_pieces(tmp_path))
