"""The step's benchmark: all candidates in one table, the right baselines, and a refusal of models that differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_step

SMALL = [
    "model.vocab_size=512", "model.dim=64", "model.num_layers=2", "model.dense_hidden=64", "model.experts.hidden=32",
    "seq_len=32", "batch.sequences=2",
]  # fmt: skip
OURS = {f"step {p}" for p in bench_step.PRECISIONS} | {f"forward+backward {p}" for p in bench_step.PRECISIONS}
THEIRS = {f"forward+backward transformers {p} {a}" for p in ("bf16", "fp32") for a in bench_step.ATTENTION}
COMMAND = ["--device", "cpu", "--repeats", "2", "--warmup", "0"]


def measured(tmp_path: Path) -> dict[tuple[str, str], dict[str, object]]:
    file = tmp_path / "step.json"
    bench_step.main([*COMMAND, "--json", str(file), *SMALL])
    return {(r["name"], r["metric"]): r for r in json.loads(file.read_text())}


def test_all_candidates_stand_in_one_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    records = measured(tmp_path)
    assert set(records) == {(n, m) for n in OURS | THEIRS for m in ("time", "fastest", "throughput")}
    assert all(isinstance(r["value"], float) and r["value"] > 0 for r in records.values())
    assert records["forward+backward fp8", "time"]["baseline"] == "forward+backward bf16"
    assert records["forward+backward bf16", "fastest"]["baseline"] in THEIRS
    assert records["step fp8", "fastest"]["baseline"] == "step bf16"
    assert records["step bf16", "time"]["baseline"] is None
    fp8, bf16 = (records[f"forward+backward {p}", "fastest"] for p in ("fp8", "bf16"))
    assert fp8["ratio"] == pytest.approx(fp8["value"] / bf16["value"])  # type: ignore[operator]


def test_without_transformers_ours_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "tests.model.hf_oracle", raising=False)
    assert {name for name, _ in measured(tmp_path)} == OURS
    assert "transformers is not installed (extra `hf`): nothing is measured beside it\n" in capsys.readouterr().out


def test_the_faster_of_transformers_is_the_baseline() -> None:
    seconds = {"bf16": [1.0], "fp8": [2.0], "transformers bf16 eager": [0.8], "transformers bf16 sdpa": [0.7]}
    chosen = bench_step.baselines(seconds)
    assert chosen["bf16"] == "transformers bf16 sdpa" and chosen["fp8"] == "bf16"
    assert bench_step.baselines({"bf16": [1.0], "fp8": [2.0]}) == {"fp8": "bf16"}


@pytest.mark.parametrize("other", [5.06, 4.94, float("nan")])
def test_models_that_differ_are_refused(other: float) -> None:
    bench_step.check_losses({"bf16": lambda: 5.0, "fp8": lambda: 5.04})
    with pytest.raises(ValueError, match=r"^loss of fp8 .* must differ by at most 1 %$"):
        bench_step.check_losses({"bf16": lambda: 5.0, "fp8": lambda: other})
