"""Tokenization beside `datasets`: the text, the ratios, and both sides' ids on a small corpus."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_tokenize
from benchmarks.bench_tokenize import Bench, figures, write_corpus
from fp8moe.data import sources
from tests.data.conftest import library

__all__ = ["library"]


@pytest.fixture
def small(library: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The corpus is that small library; its bytes."""
    monkeypatch.setattr(sources, "standard_library_root", lambda: library)
    return sum(len(document.text.encode()) for document in sources.read_corpus(library))


def test_the_text_has_its_size_and_no_document_twice(small: int, tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "t.jsonl", 3 * small)
    found = [json.loads(line)["text"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert written == sum(len(text.encode()) for text in found) >= 3 * small
    assert written - len(found[-1].encode()) < 3 * small and len(set(found)) == len(found)


def test_ratios_are_paired_and_of_as_many_processes() -> None:
    seconds = {"fp8moe 1": [2.0, 4.0, 2.0], "fp8moe 2": [1.0, 1.0, 1.0], "datasets 1": [6.0, 4.0, 4.0],
               "datasets 2": [2.0, 3.0, 9.0], "datasets 1 threads": [3.0, 2.0, 4.0]}  # fmt: skip
    found = figures(seconds, 12_000_000)
    assert found["fp8moe 1"] == (6.0, "datasets 1", 2.0) and found["fp8moe 2"] == (12.0, "datasets 2", 3.0)
    assert found["datasets 1 threads"] == (4.0, "datasets 1", 2.0) and found["datasets 1"][1:] == ("datasets 1", 1.0)
    alone = figures({name: seconds[name] for name in ("fp8moe 1", "fp8moe 2")}, 12_000_000)
    assert alone["fp8moe 2"] == (12.0, "fp8moe 1", 2.0)


def test_who_is_left_out_is_said(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(Bench(tmp_path, small // 20, 300).candidates()) == ["fp8moe 1", "fp8moe 2"]
    assert "datasets is not installed and left out" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_both_sides_write_the_same_ids(small: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, small // 20, 300)
    bench.candidates()["fp8moe 1"]()
    ours = bench.output("fp8moe 1").read_bytes()
    assert np.count_nonzero(np.frombuffer(ours, dtype=np.uint16) == 0) == len(bench.source.read_text().splitlines())
    content = bench.source.read_bytes()
    bench.source.unlink()
    with pytest.raises(RuntimeError, match=r"tokenize .* ended with 3: .*does not exist"):
        bench.candidates()["fp8moe 1"]()
    bench.source.write_bytes(content)
    if not bench_tokenize.has_datasets():
        pytest.skip("needs datasets (pip install datasets)")
    bench.theirs("datasets 1", 1)()
    assert bench.output("datasets 1").read_bytes() == ours
