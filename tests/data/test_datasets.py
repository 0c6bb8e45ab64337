"""Folders of Hugging Face `datasets`: written by the package where it is installed, and in its layout by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fp8moe.__main__ import main
from fp8moe.data.readers import find_files, read_pieces
from fp8moe.errors import DataError

TEXTS = [f"document {number} é🙂\r\nsecond line {number * number}\n" for number in range(40)]


def read(path: Path, column: str = "text") -> list[str]:
    return [text for file in find_files([str(path)]).files for text, ends in read_pieces(file, column) if ends]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, without a network, its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    package = pytest.importorskip("datasets", reason="needs datasets (pip install datasets)")
    package.disable_progress_bars()
    return package


def test_what_the_package_saves(datasets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets.Dataset.from_dict({"n": list(range(40)), "text": TEXTS})
    rows.save_to_disk(tmp_path / "shards", num_shards=3)
    assert len(find_files([str(tmp_path / "shards")]).files) == 3 and read(tmp_path / "shards") == TEXTS
    datasets.load_from_disk(tmp_path / "shards").map(lambda row: {"size": len(row["text"])})
    assert list((tmp_path / "shards").glob("cache-*")) and read(tmp_path / "shards") == TEXTS
    rows.select(range(7)).save_to_disk(tmp_path / "shards", num_shards=2)
    assert read(tmp_path / "shards") == TEXTS[:7], "shards of an earlier save are left out"
    rows.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    assert read(tmp_path / "shuffled") == list(datasets.load_from_disk(tmp_path / "shuffled")["text"]) != TEXTS
    for kind in ("large_string", "string_view"):
        rows.cast_column("text", datasets.Value(kind)).save_to_disk(tmp_path / kind)
        assert read(tmp_path / kind) == TEXTS
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two" / "test") == [TEXTS[5]]
    out = str(tmp_path / "t")
    words = ["--input", str(tmp_path / "two"), "--output", out, "--vocab-size", "300", "--workers", "1"]
    assert main(["tokenize", *words]) == 0 and main(["data", out, "--samples", "0"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'two'} is read as its train split, 1 of its files; left out: 1 of test (tokenize" in said
    assert "40 documents from 1 files" in said and f"{len(''.join(TEXTS).encode()):,} bytes of text" in said


def test_what_the_package_loads(datasets: Any, tmp_path: Path) -> None:
    """Folders of its cache, and those that `download_and_prepare` fills."""
    source = str(tmp_path / "texts.jsonl")
    Path(source).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    loaded = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(tmp_path / "cache"))
    loaded.map(lambda row: {"text": row["text"] * 2})
    (folder,) = {Path(one["filename"]).parent for one in loaded.cache_files}
    assert list(folder.glob("cache-*.arrow")) and read(folder) == TEXTS
    for kind in ("arrow", "parquet"):
        builder = datasets.load_dataset_builder("json", data_files=source, cache_dir=str(tmp_path / kind))
        builder.download_and_prepare(str(tmp_path / "out" / kind), file_format=kind)
        assert read(tmp_path / "out" / kind) == TEXTS
    both = {"train": source, "test": source}
    builder = datasets.load_dataset_builder("json", data_files=both, cache_dir=str(tmp_path / "both"))
    builder.download_and_prepare(str(tmp_path / "splits"))
    with pytest.raises(
        DataError, match=r"of the splits train, test: give the files of one of them, .*\*-train\*.arrow"
    ):
        read(tmp_path / "splits")
    assert [text for path in (tmp_path / "splits").glob("*-train*.arrow") for text in read(path)] == TEXTS


def write_arrow(path: Path, texts: Sequence[str], kind: str = "string", format: str = "stream") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pyarrow.table({"n": list(range(len(texts))), "text": pyarrow.array(texts, getattr(pyarrow, kind)())})
    make = pyarrow.ipc.new_stream if format == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)


@pytest.mark.parametrize("format", ["stream", "file"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_the_layout_of_a_saved_data_set(tmp_path: Path, kind: str, format: str) -> None:
    """Several shards in the order of state.json, in a folder of splits; caches and older shards beside them."""
    for split, texts in (("train", TEXTS), ("test", TEXTS[:2])):
        names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
        for name, part in zip(names, (texts[:1], texts[1:]), strict=True):
            write_arrow(tmp_path / split / name, part, kind, format)
        write_arrow(tmp_path / split / "cache-4b.arrow", ["not of it"])
        write_arrow(tmp_path / split / "data-00000-of-00004.arrow", ["of an earlier save"])
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (tmp_path / split / "state.json").write_text(json.dumps(state, indent=2))
        (tmp_path / split / "dataset_info.json").write_text(
            json.dumps({"features": {"text": {"dtype": kind}}}, indent=2)
        )
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "train") == TEXTS and read(tmp_path / "test") == TEXTS[:2]
    (tmp_path / "more.txt").write_text("beside it")
    found = find_files([str(tmp_path)])
    assert found.files == [tmp_path / "more.txt", *(tmp_path / "train" / name for name in names)]
    (split,) = found.splits
    assert split.others == {"test": [tmp_path / "test" / name for name in names]} and not found.passed_over
    assert split.described().startswith(
        f"{tmp_path} is read as its train split, 2 of its files; left out: 2 of test (tokenize another split by its"
    )
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"name": "x"}]}')
    with pytest.raises(
        DataError, match=r"state.json can't be read as the record of a data set .*'filename'.*: copy it"
    ):
        find_files([str(tmp_path / "train")])


def saved(folder: Path, splits: Sequence[str]) -> None:
    """A data set of splits with one document each, their names."""
    for split in splits:
        write_arrow(folder / split / "data-00000-of-00001.arrow", [split])
        (folder / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))


def test_of_saved_splits_the_one_of_train_is_read_or_a_sentence_asks(tmp_path: Path) -> None:
    saved(tmp_path / "many" / "a", ["test", "train_sft", "validation"])
    saved(tmp_path / "many" / "b", ["training", "all"])
    saved(tmp_path / "many" / "c", ["all"])
    assert read(tmp_path / "many") == ["train_sft", "training", "all"]
    found = find_files([str(tmp_path / "many")])
    assert sorted(sorted(split.others) for split in found.splits) == [["all"], ["test", "validation"]]
    for splits, count, first in (
        (["validation", "test"], 0, "validation"),
        (["test", "train_gen", "train_sft"], 2, "train_gen"),
    ):
        saved(tmp_path / first, splits)
        with pytest.raises(DataError) as raised:
            find_files([str(tmp_path / first)])
        assert str(raised.value) == (
            f"{tmp_path / first} is a data set of the splits {', '.join(splits)}, {count} of them of train: give one, "
            f"{tmp_path / first / first}"
        )


def test_the_layout_of_a_loaded_data_set(tmp_path: Path) -> None:
    """`dataset_info.json`, one line that looks like JSON lines, beside the table of each split and caches."""
    folder, info = tmp_path / "json" / "default-18", {"builder_name": "json", "splits": {"train": {"name": "train"}}}
    for number, part in enumerate((TEXTS[:9], TEXTS[9:])):
        write_arrow(folder / f"json-train-0000{number}-of-00002.arrow", part)
    write_arrow(folder / "cache-30.arrow", ["not of it"])
    (folder / "dataset_info.json").write_text(json.dumps(info))
    found = find_files([str(tmp_path)])
    assert [path.name[:16] for path in found.files] == ["json-train-00000", "json-train-00001"]
    assert found.passed_over == [] and read(folder) == TEXTS
    info["splits"] = {"train": {}, "test": {}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        DataError, match=r"of the splits train, test: give the files of one of them, .*\*-train\*.arrow"
    ):
        find_files([str(tmp_path)])
    for broken, reason in (("{", "Expecting property name"), ("[]", "it is no object")):
        (folder / "dataset_info.json").write_text(broken)
        with pytest.raises(
            DataError, match=rf"dataset_info.json can't be read as the record .*{reason}.*: copy it again"
        ):
            find_files([str(tmp_path)])


def test_a_folder_with_such_a_record_alone_is_any_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "a.txt"}, "splits": 5}')
    assert [path.name for path in find_files([str(tmp_path)]).files] == ["a.txt"]
    write_arrow(tmp_path / "b.arrow", ["b"])
    found = find_files([str(tmp_path)])
    assert [path.name for path in found.files] == ["a.txt", "b.arrow"] and found.passed_over == []
