"""Folders in the layout of the hub: of several splits the train split is read, or a sentence asks which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fp8moe.cli.tokenize import main
from fp8moe.data.hub_layout import split_of
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.readers import find_files, read_pieces
from fp8moe.errors import DataError


def write(root: Path, name: str, texts: Sequence[str]) -> Path:
    """A file of documents, of the kind that its name says."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("\n".join(texts))
    return path


def read(root: Path) -> list[str]:
    return [text for file in find_files([str(root)]).files for text, _ in read_pieces(file)]


@pytest.mark.parametrize("train, others", [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
     ["data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"]),
    (["train/0000.parquet", "train/b/0001.parquet"], ["test/0000.parquet", "validation/0000.parquet"]),
    (["plain/train/0.parquet", "main/train/0.parquet"], ["main/test/0.parquet", "plain/test/0.parquet"]),
    (["train.jsonl", "train_2.jsonl"], ["dev.jsonl"]),
    (["en/c4-train.00000-of-01024.jsonl", "en/c4-train.00001-of-01024.jsonl"],
     ["en/c4-validation.00000-of-00008.jsonl"]),
    (["train/chunk1/example_train_0.jsonl", "train/test-cases.jsonl"], ["test/chunk1/example_holdout_0.jsonl"]),
    (["wiki.train.txt", "more/training.txt"], ["wiki.valid.txt", "wiki.test.txt"]),
])  # fmt: skip
def test_of_several_splits_the_train_split_is_read(train: list[str], others: list[str], tmp_path: Path) -> None:
    root = tmp_path / "test" / "corpus"  # what lies above the folder says nothing
    for name in (*train, *others):
        write(root, name, [name])
    for name in ("README.md", "train.md", "dataset_infos.json"):
        write(root, name, ['{"default": {"splits": {}}}'])
    found = find_files([str(root)])
    assert sorted(found.files) == sorted(root / name for name in train) and found.passed_over == []
    assert sorted(read(root)) == sorted(train)
    (split,) = found.splits
    assert sorted(one for files in split.others.values() for one in files) == sorted(root / name for name in others)
    assert sorted(split.rest) == [root / "README.md", root / "train.md"]


@pytest.mark.parametrize("names", [
    ["data/train-00000-of-00001.parquet", "data/train-00001-of-00001.parquet", "README.md"],  # one split
    ["data/test-00000-of-00001.parquet"],
    ["latest.jsonl", "contest.jsonl", "trains.jsonl", "developers.jsonl"],  # words within words
    ["night train.txt", "the test.txt", "odyssey.txt"],  # titles of books
    ["train.md", "test.md"],
])  # fmt: skip
def test_other_folders_are_read_whole(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path, name, [name])
    found = find_files([str(tmp_path)])
    assert sorted(found.files) == sorted(tmp_path / name for name in names) and found.splits == []


@pytest.mark.parametrize("names, words", [
    (["test.jsonl", "validation.jsonl"], "has files of the splits test, validation and none of train: name the files"),
    (["train.jsonl", "test.jsonl", "more.jsonl"], "splits train, test and 1 of none, more.jsonl: name the files to"),
    (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet",
      "data/test_sft-00000-of-00001.parquet"],
     r"has the train splits train_gen, train_sft: name the files of one, .*/data/train_gen-\*"),
])  # fmt: skip
def test_where_the_split_is_not_clear_a_sentence_asks(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path, name, [name])
    with pytest.raises(DataError, match=words):
        find_files([str(tmp_path)])
    assert read(tmp_path / names[0]) == [names[0]], "a file that is named is read"


def test_the_command_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "hub"
    for name, texts in (("train", ["a b", "c d"]), ("validation", ["e"]), ("test", ["f", "g"])):
        write(root, f"data/{name}-00000-of-00001.parquet", texts)
    write(root, "README.md", ["---\nlicense: mit\n---"])
    words = ["--output", str(tmp_path / "t"), "--vocab-size", "300", "--workers", "1"]
    assert main(["--input", str(root), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        f"{root} is read as its train split, 1 of its files; left out: 1 of test, 1 of validation, 1 of no split "
        "(tokenize another split by its name, for data.validation_paths)"
    )
    assert len(IndexedDataset(tmp_path / "t")) == 2
    validation = str(next((root / "data").glob("validation-*")))
    assert main(["--input", validation, *words, "--force"]) == 0 and len(IndexedDataset(tmp_path / "t")) == 1


def test_the_outermost_folder_that_names_a_split_counts() -> None:
    cases = {"train/test-0.jsonl": "train", "a/Dev/train.txt": "validation", "x/eval_3.json": "test", "a/b": ""}
    assert {name: split_of(Path(name)) for name in cases} == cases
