"""Folders built once: by one of many, whole or not at all."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from fp8moe.data import cache
from fp8moe.data.cache import built_folder, cache_root, key_of
from fp8moe.errors import DataError


def race(root: Path, built: list[int], patience: float) -> list[str]:
    """Eight threads that want one folder; each opens the lock file anew, as processes do.

    A builder stops half-way until two of them are at work, at most `patience` seconds.
    """
    enough = threading.Event()

    def build(folder: Path) -> None:
        built.append(1)
        (folder / "half").write_text("a")
        if len(built) >= 2:
            enough.set()
        enough.wait(patience)
        (folder / "whole").write_text("b")

    contents: list[str] = []

    def want() -> None:
        contents.append((built_folder(root, "thing", build) / "whole").read_text())

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return contents


def test_many_want_it_and_one_builds_it(tmp_path: Path) -> None:
    built: list[int] = []
    assert race(tmp_path / "c", built, patience=0.3) == ["b"] * 8
    assert len(built) == 1
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"thing", ".thing.lock"}


def test_without_locks_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    built: list[int] = []
    assert race(tmp_path / "c", built, patience=30) == ["b"] * 8
    assert len(built) > 1
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"thing", ".thing.lock"}


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("a")
        raise DataError("bad text")

    with pytest.raises(DataError, match="bad text"):
        built_folder(tmp_path, "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]
    assert list(built_folder(tmp_path, "thing", lambda folder: None).iterdir()) == []


def test_files_are_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, built = [], []
    real = cache.sync

    def sync(path: Path) -> None:
        real(path)
        flushed.append((path.name, (tmp_path / "c" / "thing").exists()))

    def build(folder: Path) -> None:
        built.append(folder)
        for name in "ab":
            (folder / name).write_text(name)

    monkeypatch.setattr(cache, "sync", sync)
    for _ in range(2):
        assert built_folder(tmp_path / "c", "thing", build) == tmp_path / "c" / "thing"
    assert sorted(flushed[:2]) == [("a", False), ("b", False)]
    assert flushed[2:] == [(built[0].name, False), ("c", True)], "the names in the folder, then its own"
    assert len(built) == 1 and built[0].parent == tmp_path / "c" and not built[0].exists()


def test_a_folder_that_cannot_get_its_name_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data cache .* can't be written"):
        built_folder(tmp_path, "thing", lambda folder: (tmp_path / "thing").write_text("a file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".thing.lock", "thing"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir") as caught:
        built_folder(tmp_path / "file" / "cache", "thing", lambda folder: None)
    assert "\n" not in str(caught.value)


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "fp8moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "fp8moe"
    assert cache_root("~/x") == tmp_path / "x"


def test_keys_tell_parts_apart() -> None:
    assert key_of("a", 1, [2.5]) == hashlib.sha256(b'["a", 1, [2.5]]').hexdigest()[:20]  # names of existing folders
    assert len({key_of("a", "b"), key_of("ab"), key_of("a", 1), key_of("a", "1"), key_of(["a", "b"])}) == 5


def test_a_cache_below_folders_that_are_not_there_is_made(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet" / "there"
    assert built_folder(root, "thing", lambda folder: (folder / "whole").write_text("x")).parent == root  # type: ignore
    assert (root / "thing" / "whole").read_text() == "x"
