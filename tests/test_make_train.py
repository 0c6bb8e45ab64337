"""`make train DATA=book.txt`: the text is tokenized once, again when it is newer, and then trained on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in *"${FAIL_ON:-no such command}"*) exit 3 ;; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a fake Python that notes what it would run."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "tree"


def make(tree: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    """`make train` with `words` -> exit code, what would have run."""
    log = tree.parent / "log"
    log.write_text("")
    command = ["make", "-s", "-C", str(tree), "VENV=", f"PYTHON={tree.parent / 'python'}", "train", *words]
    known = {"PATH": os.environ["PATH"], "LOG": str(log)}
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines()


def test_a_text_is_tokenized_once_and_again_when_it_is_newer(tree: Path, tmp_path: Path) -> None:
    text = tmp_path / "my book.txt"
    text.write_text("text")
    code, lines = make(tree, f"DATA={text}", "ARGS=steps=2")
    found = re.search(r"--output (runs/text/my_book_txt-\d+)$", lines[0])
    assert found is not None and code == 0
    prefix = found[1]
    train = f"-m fp8moe train --nproc auto experiment=quickstart data.source=indexed data.paths=[{prefix}] steps=2"
    assert lines == [f"-m fp8moe tokenize --force --input {text} --output {prefix}", train]
    index = tree / f"{prefix}.idx"
    index.parent.mkdir(parents=True)
    index.touch()
    assert make(tree, f"DATA={text}", "ARGS=steps=2") == (0, [train])
    os.utime(text, (index.stat().st_mtime + 9,) * 2)
    assert len(make(tree, f"DATA={text}")[1]) == 2


def test_two_texts_of_one_name_have_files_of_their_own(tree: Path, tmp_path: Path) -> None:
    commands = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text("text")
        commands.add(make(tree, f"DATA={tmp_path / folder / 'book.txt'}")[1][1])
    assert len(commands) == 2


def test_a_file_below_a_folder_that_is_newer(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    lines = make(tree, f"DATA={tmp_path / 'texts'}")[1]
    index = tree / f"{lines[0].split()[-1]}.idx"
    index.parent.mkdir(parents=True)
    index.touch()
    later = (index.stat().st_mtime + 9,) * 2
    os.utime(tmp_path / "texts" / "a.txt", later)
    assert len(make(tree, f"DATA={tmp_path / 'texts'}")[1]) == 2
    os.utime(index, later)
    assert len(make(tree, f"DATA={tmp_path / 'texts'}")[1]) == 1


def test_nothing_is_trained_where_the_text_cannot_be_read(tree: Path, tmp_path: Path) -> None:
    code, lines = make(tree, f"DATA={tmp_path / 'none.txt'}", FAIL_ON="tokenize")
    assert code != 0 and len(lines) == 1
