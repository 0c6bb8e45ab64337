"""Reads the text of parquet files and of Hugging Face data sets on disk, by pyarrow, without a network.

`datasets.save_to_disk` writes a folder of `.arrow` files (Arrow's stream format) that `state.json` lists in order;
other `.arrow` files there are the library's caches, or left of an earlier save, and are left out. A folder of several
splits has `dataset_dict.json`: its train split is read (`hub_layout`). The folder in which `load_dataset` keeps a data
set has `dataset_info.json` alone, which names its splits, beside `NAME-SPLIT.arrow`, or several with numbers, or
parquet, and caches named `cache-*`.
The `datasets` package itself is not needed: it would bring a network client and a cache to read one column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fp8moe.data.hub_layout import TRAIN, TrainSplit, split_of
from fp8moe.errors import DataError

TABLE_ENDINGS = (".parquet", ".arrow")
SPLITS = "dataset_dict.json"
INFO = "dataset_info.json"
RECORDS = (SPLITS, INFO, "dataset_infos.json")  # the last: what folders of the hub had before cards
_ROWS = 256
_FILE_MAGIC = b"ARROW1"  # of Arrow's file format; its stream format has none


def saved_train_split(folder: Path) -> TrainSplit | None:
    """The train split of a data set that was saved with several splits; None for any other folder.

    Raises DataError, also where not one of the splits is of train, and OSError.
    """
    record = folder / SPLITS
    splits = [str(name) for name in _listed(record, "splits")] if record.is_file() else []
    if len(splits) < 2:
        return None
    train = [name for name in splits if split_of(Path(name)) == TRAIN]
    if len(train) != 1:
        raise DataError(
            f"{folder} is a data set of the splits {', '.join(splits)}, {len(train)} of them of train: give one, "
            f"{folder / (train or splits)[0]}"
        )
    files = {name: files_of_dataset(folder / name) or [] for name in splits}
    return TrainSplit(folder, files.pop(train[0]), files, [])


def files_of_dataset(folder: Path) -> list[Path] | None:
    """The files of a data set that was saved or loaded, in order; None for any other folder.

    Raises DataError, also where a loaded one has several splits, and OSError.
    """
    record = folder / "state.json"
    if not (folder / INFO).is_file():
        return None
    if not record.is_file():
        return _files_of_loaded(folder)
    try:
        files = [folder / str(one["filename"]) for one in _listed(record, "_data_files")]
    except (KeyError, TypeError) as error:
        raise _unknown(record, f"a file without a name: {error}") from error
    for file in files:
        if not file.is_file():
            raise DataError(f"{record} lists {file.name}, which is missing: copy the data set again")
    return files


def _files_of_loaded(folder: Path) -> list[Path] | None:
    tables = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_ENDINGS)
    files = [path for path in tables if not path.name.startswith("cache-")]
    splits = _read(folder / INFO).get("splits") if files else None
    if not isinstance(splits, dict) or not splits:  # another program's record of that name
        return None
    if len(splits) > 1:
        raise DataError(
            f"{folder} is a data set of the splits {', '.join(splits)}: give the files of one of them, "
            f"{folder / f'*-{next(iter(splits))}*{files[0].suffix}'}"
        )
    return files


def _listed(record: Path, key: str) -> list[Any]:
    listed = _read(record).get(key)
    if not isinstance(listed, list):
        raise _unknown(record, f"it has no list {key!r}")
    return listed


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unknown(record, error) from error
    if not isinstance(found, dict):
        raise _unknown(record, "it is no object")
    return found


def _unknown(record: Path, reason: object) -> DataError:
    return DataError(f"{record} can't be read as the record of a data set ({reason}): copy it again")


def read_column(path: Path, column: str) -> Iterator[str]:
    """The values of a column of text, in order, "" where there is none.

    Raises DataError: pyarrow is missing, the file is broken, it has no such column, or the column holds no text.
    """
    with _reading(path) as pyarrow:
        schema, batches = _opened(pyarrow, path, (column,))
        _check(pyarrow, path, schema, column)
        for batch in batches:
            for text in batch.column(batch.schema.get_field_index(column)).to_pylist():
                yield "" if text is None else text


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows, with those of `columns` that there are; of a table that has none of them, all columns' names with None.

    Raises DataError: pyarrow is missing, or the file is broken.
    """
    with _reading(path) as pyarrow:
        schema, batches = _opened(pyarrow, path, columns)
        there = [name for name in columns if name in schema.names]
        for batch in batches:
            if there:
                yield from batch.select(there).to_pylist()
            else:
                yield from (dict.fromkeys(schema.names) for _ in range(batch.num_rows))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """pyarrow, whose errors within the block are a DataError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'fp8moe[data]'") from error
    try:
        yield pyarrow
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; pyarrow's of broken content has none
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} can't be read by pyarrow ({reason}): it is cut off or damaged, copy it again") from (
            error
        )


def _opened(pyarrow: Any, path: Path, wanted: tuple[str, ...]) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches that have at least those of the wanted columns that the schema has)."""
    if path.suffix.lower() == ".parquet":
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        return table.schema_arrow, table.iter_batches(batch_size=_ROWS, columns=columns)
    with open(path, "rb") as handle:
        is_file = handle.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source = pyarrow.memory_map(str(path))
    if not is_file:
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    reader = pyarrow.ipc.open_file(source)
    return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))


def _check(pyarrow: Any, path: Path, schema: Any, column: str) -> None:
    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        return any(test(kind) for test in tests)

    texts = [one.name for one in schema if is_text(one.type)]
    use = f"use --text-key {texts[0]}" if texts else "no column of it holds text"
    if column not in schema.names:
        names = ", ".join(schema.names) or "none"
        names = names if len(names) <= 200 else f"{names[:200]}..."
        raise DataError(f"{path} has no column {column!r}, it has {names}: {use}")
    kind = schema.field(column).type
    if not is_text(kind):
        raise DataError(f"{path}: column {column!r} is of type {kind}, it must be text: {use}")
