"""Conversations of files: JSON lines, compressed, ShareGPT's and parquet; bad rows by their file and number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fp8moe.data.chat_rows import is_chat_file, read_conversations
from fp8moe.errors import DataError
from tests.data.chats import TURNS, exchange, write_rows


def read(path: Path) -> list[Any]:
    return [messages for _, messages in read_conversations(path)]


def test_lines_compressed_lines_sharegpt_and_tables_hold_the_same(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "id": 7}, exchange("é", "b")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    expected = [row["messages"] for row in rows]
    assert read(path) == expected
    assert [place for place, _ in read_conversations(path)] == [f"{path} line 1", f"{path} line 2"]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as handle:
        handle.write(path.read_bytes() + b"\n")
    assert read(tmp_path / "a.jsonl.gz") == expected
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [[{"from": names[one["role"]], "value": one["content"]} for one in messages] for messages in expected]
    assert read(write_rows(tmp_path / "s.jsonl", [{"conversations": one} for one in turns])) == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == expected
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet row 1 has no messages, it has text: write ..messages.: "):
        read(tmp_path / "b.parquet")


def test_other_keys_of_a_message_stay() -> None:
    from fp8moe.data.chat_rows import _message

    assert _message({"role": "tool", "content": "3", "name": "sum", "id": None}, "") == {
        "role": "tool", "content": "3", "name": "sum",
    }  # fmt: skip


@pytest.mark.parametrize("line, words", [
    ('{"text": "a", "id": 3}', "line 2 has no messages, it has text, id: write {.messages.: "),
    ('{"messages": null}', "line 2 has no messages, it has messages: "),
    ("{}", "line 2 has no messages, it has none: "),
    ("[1]", r"line 2 has no messages, it is \[1\]: "),
    ('{"messages": []}', r"line 2: messages is \[\] and must be a list of at least 1 message"),
    ('{"messages": "a"}', "line 2: messages is 'a' and must be a list of at least 1 message"),
    ('{"messages": ["a"]}', "line 2, message 1 is 'a' and must be an object: write "),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "line 2, message 1 has the role 'bot': use system, deve"),
    ('{"messages": [{"content": "a"}]}', "line 2, message 1 has the role None: use"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', r"message 1 has the role \['user'\]: use"),
    ('{"messages": [{"role": "user", "content": [1]}]}', r"has the content \[1\] \(list\): it must be a string"),
    ('{"messages": [{"role": "user"}]}', r"has the content None \(NoneType\): it must be a string"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "has half of a surrogate pair"),
    ('{"messages": [{"role": "user", "content": "\\ufdd1"}]}', r"or U\+FDD0 or U\+FDD1, which no text has"),
    ('{"messages', r"line 2 is not JSON \(Invalid control character at column 11\): write one conversation a line"),
    ("no", r"line 2 is not JSON \(Expecting value at column 1\): write one conversation a line"),
])  # fmt: skip
def test_bad_rows_name_their_file_and_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(exchange('a', 'b'))}\n{line}\n")
    with pytest.raises(DataError, match=words) as raised:
        read(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_empty_missing_and_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"a.jsonl has 0 rows and a chat file needs at least 1: write one"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"none.jsonl can't be read \(No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"b\.jsonl is not UTF-8 text"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(exchange("a", "b")).encode())[:-9])
    with pytest.raises(DataError, match=r"c.jsonl.gz can't be decompressed"):
        read(tmp_path / "c.jsonl.gz")
    with pytest.raises(DataError, match=r" is a folder and a chat is a file: name its files, of several splits those"):
        read(tmp_path)


def test_names_of_chat_files() -> None:
    assert all(is_chat_file(Path(name)) for name in ("a.jsonl", "b.JSONL.gz", "c.parquet", "d.json"))
    assert not any(is_chat_file(Path(name)) for name in ("a", "a.bin", "a.txt.gz"))
