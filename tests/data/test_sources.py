"""Settings that are checked, the embedded corpus and its held-out part."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import yaml

from fp8moe.cli.command import explain
from fp8moe.data import sources
from fp8moe.data.sources import DataConfig, Document
from fp8moe.errors import DataError


def test_the_default_is_the_embedded_corpus() -> None:
    assert DataConfig().source == "stdlib"
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "indexed"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "'web' is not a data source: use stdlib or indexed"),
        ({"source": "indexed"}, "got 0"),
        ({"paths": ("a",)}, "got 1, 0 and 0"),
        ({"validation_paths": ("a",)}, "got 0, 0 and 1"),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (1.0,)}, "1 entries and data.paths has 2"),
        (
            {"source": "indexed", "paths": ("a", "b"), "weights": (1.0, -0.5)},
            r"data.weights\[1\]=-0.5 must be at least 0",
        ),
        (
            {"source": "indexed", "paths": ("a", "b"), "weights": (1.0, float("nan"))},
            r"data.weights\[1\]=nan must be a number",
        ),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (0.0, 0.0)}, "2 entries, all 0"),
        ({"validation_share": 0.0}, "=0.0 must be above 0 and at most 0.5"),
        ({"validation_share": 0.6}, "=0.6 must be above 0 and at most 0.5"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DataConfig(**settings)  # type: ignore[arg-type]
    assert explain(caught.value).code == 2 and "\n" not in str(caught.value)


def test_the_default_settings_are_those_of_the_configuration_file() -> None:
    file = Path(__file__).parents[2] / "configs" / "data" / "stdlib.yaml"
    defaults = {**dataclasses.asdict(DataConfig()), "vocab_size": "${model.vocab_size}"}
    assert yaml.safe_load(file.read_text()) == {
        name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()
    }


def test_possible_settings() -> None:
    DataConfig(source="indexed", paths=("a", "b"), weights=(0.0, 2.0), validation_paths=("c",))
    DataConfig(vocab_size=1, validation_share=0.5)


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
    assert sources.list_sources(tmp_path) == kept


def test_text_in_the_encoding_a_file_declares(tmp_path: Path) -> None:
    def read(raw: bytes) -> str | None:
        (tmp_path / "f.py").write_bytes(raw)
        return sources.read_source(tmp_path / "f.py")

    assert read("é = 'ü'\r\n".encode()) == "é = 'ü'\r\n"
    assert read("# -*- coding: cp1252 -*-\n# Jörg\n".encode("cp1252")) == "# -*- coding: cp1252 -*-\n# Jörg\n"
    assert read(b"\xef\xbb\xbfx = 1\n") == "x = 1\n"
    assert read(b"# J\xf6rg\n") is None
    assert read(b"# coding: no-such-code\n") is None


def test_the_real_library() -> None:
    documents = sources.read_corpus(sources.standard_library_root())
    names = [document.name for document in documents]
    assert names == sorted(names) and len(names) > 300 and "functools.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    sizes = {document.name: len(document.text.encode()) for document in documents}
    assert sum(sizes.values()) > 5_000_000
    train, validation = sources.split_by_file(documents, 0.025)
    assert sorted(train + validation, key=lambda document: document.name) == documents
    share = sum(sizes[document.name] for document in validation) / sum(sizes.values())
    assert 0.025 <= share < 0.032 and len(validation) > 10
    assert sources.content_key(documents) == sources.content_key(sources.read_corpus(sources.standard_library_root()))


def documents_of(sizes: dict[str, int]) -> list[Document]:
    return [Document(name, "x" * size) for name, size in sorted(sizes.items())]


def test_the_split_depends_on_names_and_sizes_only() -> None:
    documents = documents_of({f"f{i}.py": 1000 + i for i in range(200)})
    train, validation = sources.split_by_file(documents, 0.1)
    assert 20 <= len(validation) <= 21 and {document.name for document in train} & {d.name for d in validation} == set()
    backwards = sources.split_by_file(documents[::-1], 0.1)
    assert backwards[1][::-1] == validation and backwards[0][::-1] == train


def test_files_are_held_out_by_the_hash_of_their_names() -> None:
    documents = documents_of({f"f{i}.py": 100 for i in range(50)})
    by_hash = sorted((d.name for d in documents), key=lambda name: hashlib.sha256(name.encode()).digest())
    _, validation = sources.split_by_file(documents, 0.2)
    assert {document.name for document in validation} == set(by_hash[:10])


def test_the_held_out_share_is_met_and_not_passed() -> None:
    files = documents_of({f"f{i}.py": 100 for i in range(10)})
    for share, count in ((0.4, 4), (0.401, 5), (0.399, 1)):  # 399 bytes: each file is above a quarter of them
        train, validation = sources.split_by_file(files, share)
        assert (len(train), len(validation)) == (10 - count, count)
    assert len(sources.split_by_file(files, 1.0)[0]) == 1  # the training part is never empty


def test_no_giant_is_held_out() -> None:
    documents = documents_of({f"f{i}.py": 1000 for i in range(200)} | {f"giant{i}.py": 20_000 for i in range(20)})
    _, validation = sources.split_by_file(documents, 0.05)
    assert validation and not any(document.name.startswith("giant") for document in validation)


@pytest.mark.parametrize("sizes", [{"a.py": 10, "b.py": 5}, {"a.py": 1, "b.py": 1, "c.py": 10**6}])
def test_both_parts_have_something(sizes: dict[str, int]) -> None:
    train, validation = sources.split_by_file(documents_of(sizes), 0.5)
    assert train and validation
    if len(sizes) == 2:  # none is below a quarter of the share: the smallest is held out
        assert [document.name for document in validation] == ["b.py"]


def test_content_key_sees_names_and_text() -> None:
    keys = {
        sources.content_key(documents)
        for documents in (
            [Document("a", "xy"), Document("b", "z")],
            [Document("a", "x"), Document("b", "yz")],
            [Document("a", "xy"), Document("c", "z")],
            [Document("a", "xy")],
            [Document("a", "xz"), Document("b", "z")],
        )
    }
    assert len(keys) == 5


def test_an_empty_corpus_is_a_data_error(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="found 0") as caught:
            sources.read_corpus(root)
        assert caught.value.exit_code == 3
    (tmp_path / "a.py").write_text("x\n")
    (tmp_path / "b.py").write_text("")
    with pytest.raises(DataError, match="found 1"):
        sources.read_corpus(tmp_path)
    (tmp_path / "c.py").write_text("y\n")
    assert sources.read_corpus(tmp_path) == [Document("a.py", "x\n"), Document("c.py", "y\n")]
