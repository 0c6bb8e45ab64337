"""The benchmark of generation: both ways give the same logits, and the ratios are of tokens a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_generate

SMALL = [
    "model.vocab_size=128",
    "model.dim=64",
    "model.num_layers=2",
    "model.dense_hidden=64",
    "model.experts.hidden=32",
]


def test_all_candidates_stand_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generate, "LENGTHS", (16, 48))
    command = ["--device", "cpu", "--repeats", "2", "--warmup", "0", "--json", str(tmp_path / "out.json"), *SMALL]
    bench_generate.main(command)
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["shape"].rpartition(" ")[2] for record in records] == ["T16"] * 4 + ["T48"] * 4 + ["16"] * 2
    for at in (0, 4):
        error, recomputed, cached, together = records[at : at + 4]
        assert error["metric"] == "error" and error["value"] < 1e-4
        assert recomputed["baseline"] is None and {cached["baseline"], together["baseline"]} == {"recomputed"}
        assert together["value"] > cached["value"] > 0 and together["unit"] == "tokens/s"
        assert cached["ratio"] == pytest.approx(cached["value"] / recomputed["value"], rel=0.5)
    alone, shared = records[8:]
    assert (alone["name"], shared["baseline"], alone["baseline"]) == ("of a prompt each", "of a prompt each", None)
    assert shared["ratio"] == pytest.approx(shared["value"] / alone["value"], rel=0.5)
