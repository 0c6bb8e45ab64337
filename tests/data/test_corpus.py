"""The embedded corpus: which files, which text, and which of them are held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.data import corpus
from fp8moe.data.corpus import Document
from fp8moe.errors import DataError


def test_which_files(tmp_path: Path) -> None:
    kept = ["a.py", "b/__init__.py", "b/c.py", "lib2to3/tests_not.py", "z.py"]
    dropped = [
        *(
            "site-packages/x.py",
            "b/test/t.py",
            "lib2to3/tests/data/py2.py",
            "idlelib/idle_test/t.py",
            "encodings/cp1.py",
        ),
        *("config-3.11-x/python-config.py", "_sysconfigdata_x.py", "b/__pycache__/c.py", "readme.txt", "x.pyc"),
    ]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    assert corpus.list_sources(tmp_path) == kept


def test_text_in_the_encoding_a_file_declares(tmp_path: Path) -> None:
    def read(raw: bytes) -> str | None:
        (tmp_path / "f.py").write_bytes(raw)
        return corpus.read_source(tmp_path / "f.py")

    assert read("é = 'ü'\r\n".encode()) == "é = 'ü'\r\n"
    assert read("# -*- coding: cp1252 -*-\n# Jörg\n".encode("cp1252")) == "# -*- coding: cp1252 -*-\n# Jörg\n"
    assert read(b"\xef\xbb\xbfx = 1\n") == "x = 1\n"
    assert read(b"# J\xf6rg\n") is None
    assert read(b"# coding: no-such-code\n") is None


def test_the_real_library() -> None:
    documents = corpus.read_corpus(corpus.standard_library_root())
    names = [document.name for document in documents]
    assert names == sorted(names) and len(names) > 300 and "functools.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    sizes = {document.name: len(document.text.encode()) for document in documents}
    assert sum(sizes.values()) > 5_000_000
    train, validation = corpus.split_by_file(documents, 0.025)
    assert sorted(train + validation, key=lambda document: document.name) == documents
    share = sum(sizes[document.name] for document in validation) / sum(sizes.values())
    assert 0.025 <= share < 0.032 and len(validation) > 10
    assert corpus.content_key(documents) == corpus.content_key(corpus.read_corpus(corpus.standard_library_root()))


def documents_of(sizes: dict[str, int]) -> list[Document]:
    return [Document(name, "x" * size) for name, size in sorted(sizes.items())]


def test_the_split_depends_on_names_and_sizes_only() -> None:
    documents = documents_of({f"f{i}.py": 1000 + i for i in range(200)})
    train, validation = corpus.split_by_file(documents, 0.1)
    assert 20 <= len(validation) <= 21 and {document.name for document in train} & {d.name for d in validation} == set()
    backwards = corpus.split_by_file(documents[::-1], 0.1)
    assert backwards[1][::-1] == validation and backwards[0][::-1] == train


def test_no_giant_is_held_out() -> None:
    documents = documents_of({f"f{i}.py": 1000 for i in range(200)} | {f"giant{i}.py": 20_000 for i in range(20)})
    _, validation = corpus.split_by_file(documents, 0.05)
    assert validation and not any(document.name.startswith("giant") for document in validation)


@pytest.mark.parametrize("sizes", [{"a.py": 10, "b.py": 5}, {"a.py": 1, "b.py": 1, "c.py": 10**6}])
def test_both_parts_have_something(sizes: dict[str, int]) -> None:
    train, validation = corpus.split_by_file(documents_of(sizes), 0.5)
    assert train and validation


def test_content_key_sees_names_and_text() -> None:
    keys = {
        corpus.content_key(documents)
        for documents in (
            [Document("a", "xy"), Document("b", "z")],
            [Document("a", "x"), Document("b", "yz")],
            [Document("a", "xy"), Document("c", "z")],
            [Document("a", "xy")],
        )
    }
    assert len(keys) == 4


def test_an_empty_corpus_is_a_data_error(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="found 0") as caught:
            corpus.read_corpus(root)
        assert caught.value.exit_code == 3
    (tmp_path / "a.py").write_text("x\n")
    (tmp_path / "b.py").write_text("")
    with pytest.raises(DataError, match="found 1"):
        corpus.read_corpus(tmp_path)
