"""Text files, JSON lines, compressed files and tables, kept byte for byte; faults named with their place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8moe.data import readers
from fp8moe.data.readers import find_files, read_pieces
from fp8moe.errors import DataError


def test_files_are_found_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "b/c/3.JSONL", "b/skip.bin", "a.anything"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "a.anything"), str(tmp_path / "b"), str(tmp_path / "b" / "2.txt")])
    assert found.passed_over == [tmp_path / "b" / "skip.bin"]
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
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
    "text",
    ["", "one", "a\nb\n", "line\r\nline\rline\n" * 9, "x" * 300, "é🙂\n" * 60, "\ufeffa\n\n\n" * 20, "abcdef\r" * 30],
)
def test_a_text_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARS", 40)
    monkeypatch.setattr(readers, "_LINE_CHARS", 20)
    (tmp_path / "t.txt").write_bytes(text.encode())
    pieces = list(read_pieces(tmp_path / "t.txt"))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == ([False] * (len(pieces) - 1) + [True])
    assert all(0 < len(piece) <= 60 for piece, _ in pieces) or not text
    if text.endswith(("\n", "\r")):
        assert all(piece[-1] in "\r\n" for piece, _ in pieces)


def test_json_lines(tmp_path: Path) -> None:
    texts = ["a\nb", "é\u2028\x85🙂", "", "last"]
    lines = [json.dumps({"body": text, "n": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_bytes(("\n\n".join(lines) + "\r\n").encode())
    assert list(read_pieces(tmp_path / "t.jsonl", "body")) == [(text, True) for text in texts]
    (tmp_path / "u.jsonl").write_bytes(b'{"text":\r"a"}\n')  # a lone \r is a space of JSON, no line end
    assert list(read_pieces(tmp_path / "u.jsonl")) == [("a", True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"good\nbad \xff", r"t.txt is not UTF-8 text \(byte 0xff"),
        ("t.jsonl", b'{"text": "\xff"}', r"t.jsonl is not UTF-8 text \(byte 0xff"),
        ("t.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("t.jsonl", b"[1]", 'line 1 is of type list and must be an object: write {"text": ...} a line'),
        ("t.jsonl", b'{"other": "a", "b": 1}', "line 1 has no key 'text', it has b, other"),
        ("t.jsonl", b"{}", "it has none"),
        ("t.jsonl", b'\n{"text": 5}', "line 2: the value of 'text' is of type int"),
        ("t.jsonl", b'{"text": "a\\ud83d"}', "line 1: character 1 is half"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_pieces(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't be read \(Is a directory\)"):
        list(read_pieces(tmp_path))


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending == ".gz" else zstd
    line, text = json.dumps({"text": "é\r\n🙂"}).encode() + b"\n", "plain\r\ntext é\n" * 9
    (tmp_path / f"a.JSONL{ending}").write_bytes(pack(line) + pack(line * 2))  # two members, or frames
    (tmp_path / f"b.json{ending}").write_bytes(pack(line))
    (tmp_path / f"c.txt{ending}").write_bytes(pack(text.encode()))
    (tmp_path / f"d.bin{ending}").write_bytes(b"anything")
    found = find_files([str(tmp_path)])
    assert found.passed_over == [tmp_path / f"d.bin{ending}"]
    pieces = [list(read_pieces(path)) for path in found.files]
    assert pieces == [[("é\r\n🙂", True)] * 3, [("é\r\n🙂", True)], [(text, True)]]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_that_are_broken(tmp_path: Path, ending: str) -> None:
    """Cut off at any byte, or with a wrong one: an error, never less text in silence."""
    content = (gzip.compress if ending == ".gz" else zstd)(bytes(range(32, 120)) * 99)
    path = tmp_path / f"a.txt{ending}"
    for cut in range(1, len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"a.txt.* can't be (decompressed|read)") as caught:
            list(read_pieces(path))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"no such format" * 9)
    with pytest.raises(DataError, match=r"a.txt.* can't be (decompressed|read)"):
        list(read_pieces(path))


def test_json_that_is_json_lines_and_json_that_is_not(tmp_path: Path) -> None:
    for name, content in {
        "lines.json": '\n{"text": "a"}\n{"text": "b"}\n',
        "list.json": '[{"text": "a"}]',
        "pretty.json": json.dumps({"text": "a"}, indent=1),
        "latin.json": "",
        "empty.json": "",
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.json").write_bytes(b'{"text": "\xff"}')
    found = find_files([str(tmp_path)])
    assert [path.name for path in found.files] == ["lines.json"] and len(found.passed_over) == 4
    assert list(read_pieces(tmp_path / "lines.json")) == [("a", True), ("b", True)]
    for name in ("list.json", "pretty.json", "empty.json"):
        with pytest.raises(DataError, match=f"{name} is not JSON lines .*: write one object a line"):
            list(read_pieces(tmp_path / name))


def test_files_passed_over_are_counted_and_the_first_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    assert readers.named(paths[:1]) == f"1 other file: {paths[0]}"
    assert readers.named(paths, 2) == f"7 other files: {paths[0]}, {paths[1]} and 5 more"
    paths[0].write_text("")
    with pytest.raises(DataError, match=r"0 files found in .* \(1 other file: .*0.png\): a folder must hold .*parquet"):
        find_files([str(tmp_path)])


TEXTS = ["first é", "", None, "third 🙂\r\n" * 9]


def table(pyarrow: Any, kind: str) -> Any:
    types = {"string": pyarrow.string(), "large": pyarrow.large_string()}
    texts = pyarrow.array(TEXTS, types.get(kind, pyarrow.string()))
    texts = texts.dictionary_encode() if kind == "dictionary" else texts
    return pyarrow.table({"n": list(range(4)), "body": texts, "text.b": TEXTS})


@pytest.mark.parametrize("kind", ["string", "large", "dictionary"])
def test_tables(tmp_path: Path, kind: str) -> None:
    """Parquet and both formats of Arrow, as pyarrow itself writes them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = table(pyarrow, kind)
    parquet.write_table(rows, tmp_path / "a.parquet", row_group_size=3)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    files = find_files([str(tmp_path)]).files
    assert [path.name for path in files] == ["a.parquet", "b.arrow", "c.arrow"]
    for path in files:
        for column in ("body", "text.b"):
            assert list(read_pieces(path, column)) == [(text or "", True) for text in TEXTS]
        with pytest.raises(DataError, match=r"has no column 'text', it has n, body, text.b: use --text-key body"):
            list(read_pieces(path))
        with pytest.raises(DataError, match=r"column 'n' is of type int64, it must be text: use --text-key body"):
            list(read_pieces(path, "n"))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_broken_tables(tmp_path: Path, ending: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        parquet.write_table(table(pyarrow, "string"), path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table(pyarrow, "").schema) as writer:
            writer.write_table(table(pyarrow, ""))
    content = path.read_bytes()
    for broken in (b"", b"x" * 99, content[:9], content[: len(content) // 2], content[:-1]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"a{ending} can't be read by pyarrow .* copy it again") as caught:
            list(read_pieces(path, "body"))
        assert "\n" not in str(caught.value)


def saved(folder: Path, texts: list[str]) -> None:
    """What `datasets.save_to_disk` writes of a data set: two files in the order of state.json, caches beside them."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = ["data-1.arrow", "data-0.arrow", "cache-9.arrow"]
    for name, part in zip(names, (texts[:1], texts[1:], ["not of it"]), strict=True):
        rows = pyarrow.table({"text": part})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names[:2]]}))
    (folder / "dataset_info.json").write_text("{}")


def test_data_sets_on_disk(tmp_path: Path) -> None:
    saved(tmp_path / "d" / "train", ["a", "b", "c"])
    found = find_files([str(tmp_path / "d" / "train")])
    assert [path.name for path in found.files] == ["data-1.arrow", "data-0.arrow"] and found.passed_over == []
    assert [piece for path in found.files for piece in read_pieces(path)] == [(text, True) for text in "abc"]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [path.name for path in find_files([str(tmp_path / "d")]).files] == ["data-1.arrow", "data-0.arrow"]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    with pytest.raises(DataError, match=r"of the splits dev, test, 0 of them of train: give one, .*dev"):
        find_files([str(tmp_path / "d")])
    (tmp_path / "d" / "train" / "data-0.arrow").unlink()
    with pytest.raises(DataError, match=r"state.json lists data-0.arrow, which is missing"):
        find_files([str(tmp_path / "d" / "train")])
    (tmp_path / "d" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json can't be read as the record of a data set"):
        find_files([str(tmp_path / "d" / "train")])


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{name} needs .*{package}.*pip install 'fp8moe\[data\]'"):
        list(read_pieces(tmp_path / name))
