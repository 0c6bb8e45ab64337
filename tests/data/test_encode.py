"""Parallel encoding: the same bytes for every number of processes, and after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8moe.cli import tokenize
from fp8moe.data import encode
from fp8moe.data.encode import Encoder
from fp8moe.data.tokenizer import train_tokenizer
from fp8moe.errors import DataError

ENDINGS = (".bin", ".idx", ".tokenizer.json")
PROGRAM = (
    "import sys, time; from fp8moe.cli import tokenize; from fp8moe.data import encode\n"
    "encode.PART_CHARS = 2000\n"
    "save = encode._save\n"
    "def slow(*arguments):\n"
    "    save(*arguments); time.sleep(float(sys.argv[1]))\n"
    "encode._save = slow\n"
    "sys.exit(tokenize.main(sys.argv[2:]))"
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents of all lengths in a JSON lines file, and one long text: about 40 parts of 2,000 characters."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i} 🙂 " * (1 + i % 29)}) for i in range(300)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("".join(f"line {i}\n" for i in range(999)))
    tokenizer = train_tokenizer([f"document {i} line" for i in range(99)], 300)
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    return folder


def written(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in ENDINGS]


def arguments(corpus: Path, prefix: Path, *more: str) -> list[str]:
    given = str(corpus.parent / "t.json")
    return ["--input", str(corpus), "--output", str(prefix), "--tokenizer", given, *more]


def has_ended(group: int) -> bool:
    """Whether a process group has no process any more within 20 seconds; what is left then is killed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return False


def test_the_same_bytes_for_every_number_of_processes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize.main(arguments(corpus, tmp_path / "whole", "--workers", "1")) == 0
    monkeypatch.setattr(encode, "PART_CHARS", 5000)
    for workers in ("1", "2"):
        prefix = tmp_path / f"w{workers}"
        assert tokenize.main(arguments(corpus, prefix, "--workers", workers)) == 0
        assert written(prefix) == written(tmp_path / "whole")
    assert "encoded before" not in capsys.readouterr().out
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(ENDINGS))
    assert left == ["in", "t.json"], "no parts and no lock are left"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_run_that_was_killed_goes_on(corpus: Path, tmp_path: Path, workers: str) -> None:
    """The second run encodes only what the first did not, and its bytes are those of an undisturbed run."""
    assert tokenize.main(arguments(corpus, tmp_path / "whole", "--workers", "1")) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = arguments(corpus, tmp_path / "x", "--workers", workers)
    killed = subprocess.Popen([sys.executable, "-c", PROGRAM, "0.2", *command], env=environment, start_new_session=True)
    parts, deadline = tmp_path / "x.parts", time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < 3 and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    assert has_ended(killed.pid), "its encoding processes are still there"
    kept = {path.name for path in parts.glob("*.npz")}
    assert kept and not (tmp_path / "x.bin").exists() and list(tmp_path.glob(".x.bin.*"))
    (corpus / "a.jsonl").write_text((corpus / "a.jsonl").read_text())  # another time of change means nothing
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "0", *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(" parts were encoded before")[0].split()[-1]) >= len(kept)
    assert written(tmp_path / "x") == written(tmp_path / "whole")
    assert not parts.exists() and not list(tmp_path.glob(".x*"))


def test_changed_text_is_encoded_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PART_CHARS", 5000)
    parts = tmp_path / "x.parts"
    tokenizer = train_tokenizer(["document line"], 300)
    text = [(f"piece {i} " * 200, True) for i in range(9)]

    def encoded(end: int, pieces: list[tuple[str, bool]]) -> tuple[list[list[int]], int]:
        encoder = Encoder(tokenizer, end, 1, parts)
        return [part.ids.tolist() for part in encoder.encode(pieces)], encoder.reused

    first, reused = encoded(0, text)
    assert reused == 0 and encoded(0, text) == (first, len(first)) and len(first) > 2
    changed, reused = encoded(0, [*text[:-1], ("another", True)])
    assert reused == len(first) - 1 and changed[:-1] == first[:-1] and changed[-1] != first[-1]
    joined, reused = encoded(0, [(piece, number % 2 == 1) for number, (piece, _) in enumerate(text)])
    assert reused == 0 and joined != first, "where documents end is part of it"
    assert encoded(1, text)[1] == 0, "another end of text"
    next(parts.glob("*.npz")).write_bytes(b"damaged")
    for path in parts.glob("*.npz"):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"npz can't be read .* delete .*x.parts"):
        encoded(0, text)


def test_an_encoding_process_that_ends_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PART_CHARS", 100)

    def pieces() -> Iterator[tuple[str, bool]]:
        for number in range(40):
            if number == 20:
                for child in multiprocessing.active_children():
                    child.kill()
            yield f"piece {number} " * 30, True

    encoder = Encoder(train_tokenizer(["piece"], 300), 0, 2, tmp_path / "x.parts")
    with pytest.raises(DataError, match=r"one of 2 encoding processes ended, .* use fewer --workers; .*x.parts"):
        list(encoder.encode(pieces()))


def test_nobody_else_writes_the_same_files(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tokenize._only_writer(tmp_path / "x.parts"):
        assert tokenize.main(arguments(corpus, tmp_path / "x")) == 2
        assert "another fp8moe tokenize writes" in capsys.readouterr().err
        assert tokenize.main(arguments(corpus, tmp_path / "y")) == 0
    assert tokenize.main(arguments(corpus, tmp_path / "x")) == 0
