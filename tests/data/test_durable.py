"""Files that are whole or absent: what is flushed, in which order, and what an error leaves."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest

from fp8moe.cli import tokenize
from fp8moe.data import durable, readers
from fp8moe.data.durable import copy_file, make_folder, sync, unwritable, write_text
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.readers import RUN_CHARS, is_inside_run, read_pieces
from fp8moe.data.tokenizer import load_tokenizer, train_tokenizer
from fp8moe.errors import ConfigError, DataError, SpaceError


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed and of what is renamed, in order."""
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(f"rename {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_bytes_then_the_name_then_its_folder(tmp_path: Path, events: list[str]) -> None:
    folder = tmp_path / "a" / "b"
    assert make_folder(folder) == [folder, tmp_path / "a"] and make_folder(folder) == []
    assert sorted(events) == sorted(["sync a", f"sync {tmp_path.name}"])
    events.clear()
    write_text(folder / "x", "text é")
    copy_file(folder / "x", folder / "y")
    own = os.getpid()
    assert events == [f"sync .x.{own}", "rename x", "sync b", f"sync .y.{own}", "rename y", "sync b"]
    assert (folder / "y").read_text(encoding="utf-8") == "text é"
    events.clear()
    with IndexedWriter(folder / "t", 300) as writer:
        writer.add(".tokenizer.json", "{}")
        writer.write(np.arange(5))
        writer.end_document()
    names = [f".t{ending}.{own}" for ending in (".tokenizer.json", ".bin", ".idx")]
    assert events[:3] == [f"sync {name}" for name in names]
    assert events[3:] == ["rename t.tokenizer.json", "rename t.bin", "rename t.idx", "sync b"]


def test_a_folder_that_cannot_be_flushed_is_let_pass_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "x").write_text("")
    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "x")


def test_an_error_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="output"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_kind_of_error() -> None:
    for number, kind in ((errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EACCES, DataError)):
        error = unwritable("here", OSError(number, "reason"), "do this")
        assert type(error) is kind and str(error) == "here can't be written (reason): do this"


class FullDisk:
    """Every `open` for writing gives a file whose `at`-th write, counted over all, finds the disk full.

    A buffer holds what was written, so a small file meets the full disk when it is flushed.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.left, self.reached, real = at, False, open
        disk = self

        class File(io.FileIO):
            def write(self, data: object) -> int:
                disk.left -= 1
                if disk.left < 0:
                    disk.reached = True
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)  # type: ignore[arg-type]

        def opened(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)  # type: ignore[call-overload]
            file = io.BufferedWriter(File(path, "w"), 64)  # type: ignore[arg-type]
            return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8", write_through=True)

        for module in ("builtins.open", "io.open"):
            patch.setattr(module, opened)


def test_a_disk_that_is_full_at_any_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 7 and one sentence; no file is left, and with --force the old ones stay."""
    (tmp_path / "in.txt").write_text("a few words of text\n" * 9)
    write_text(tmp_path / "given.json", train_tokenizer(iter(["abc"]), 260).to_str())
    command = ["--input", str(tmp_path / "in.txt"), "--tokenizer", str(tmp_path / "given.json")]
    assert tokenize.main([*command, "--output", str(tmp_path / "old")]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    failures = 0
    for at in range(99):
        output = ["--output", str(tmp_path / "old"), "--force"] if at % 2 else ["--output", str(tmp_path / "n" / "x")]
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, at)
            code = tokenize.main([*command, *output])
        if not disk.reached:
            break
        failures += 1
        said = capsys.readouterr().err
        assert code == 7 and said.count("\n") == 1, said
        assert "can't be written (No space left on device): nothing was written, " in said and " GB are free" in said
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, at
    assert code == 0 and failures >= 3


def test_runs_without_white_space_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text with shorter runs comes in the pieces it came in before; every text comes back whole."""
    random_ = np.random.default_rng(0)
    long = "".join(random_.choice(list("abc"), 3 * RUN_CHARS + 5))
    texts = {
        "words": "word " * 3000,
        "long": f"some words {long} and\tmore",
        "spaces": "a" + " " * (2 * RUN_CHARS + 1) + "b",
        "at the bound": "x" * RUN_CHARS + "\n" + "\n" * (RUN_CHARS - 1) + "y",
    }
    pieces = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        pieces[name] = list(read_pieces(tmp_path / f"{name}.txt"))
        assert "".join(piece for piece, _ in pieces[name]) == text
        assert [ends for _, ends in pieces[name]] == [False] * (len(pieces[name]) - 1) + [True]
    assert {name: len(found) for name, found in pieces.items()} == {
        "words": 1, "long": 4, "spaces": 3, "at the bound": 1
    }  # fmt: skip
    assert [is_inside_run(piece) for piece, _ in pieces["long"]] == [False, True, True, False]
    assert not is_inside_run("x" * (RUN_CHARS - 1) + " ")
    monkeypatch.setattr(readers, "PIECE_CHARS", 1000)  # pieces of a file: the same text
    assert "".join(piece for piece, _ in read_pieces(tmp_path / "long.txt")) == texts["long"]


def test_a_line_of_letters_takes_no_longer_than_words(tmp_path: Path) -> None:
    """A megabyte; uncut it takes over 40 s."""
    letters = np.random.default_rng(0).integers(97, 123, 1_000_000, dtype=np.uint8).tobytes()
    (tmp_path / "in.txt").write_bytes(letters)
    command = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--vocab-size", "1000"]
    assert tokenize.main(command) == 0
    stored = IndexedDataset(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out.tokenizer.json")
    assert tokenizer.decode(stored.tokens[:-1].tolist()).encode() == letters
    kept = list(tokenize._thinned(["a", *["x" * RUN_CHARS] * 33, "b"]))
    assert [len(piece) for piece in kept] == [1, *[RUN_CHARS] * 5, 1], "the first, then one of 16"


def test_a_name_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    """Its hidden name is no longer, and an error names the file that was to be written."""
    path = tmp_path / ("é" * 127)
    durable.write_text(path, "here")
    durable.copy_file(path, tmp_path / ("b" * 255))
    assert {one.read_text() for one in tmp_path.iterdir()} == {"here"} and len(list(tmp_path.iterdir())) == 2
    for write in (durable.write_text, lambda path, text: durable.copy_file(tmp_path / ("b" * 255), path)):
        with pytest.raises(OSError) as caught:
            write(tmp_path / ("b" * 256), "there")
        assert caught.value.filename == f"{tmp_path}/{'b' * 256}" and caught.value.filename2 is None
    with pytest.raises(FileNotFoundError) as caught:
        durable.copy_file(tmp_path / "none", tmp_path / "copy")
    assert caught.value.filename in (tmp_path / "none", f"{tmp_path}/none")


def test_sizes_that_no_library_can_take(tmp_path: Path) -> None:
    for size in (2**20 + 1, 10**12, 2**63):
        with pytest.raises(ConfigError, match="use at most 1048576"):
            train_tokenizer(iter(["abc"]), size)
    assert durable.FULL == (errno.ENOSPC, errno.EDQUOT)
