"""`make bench-gpu`: every benchmark has its place, a part that fails or hangs ends alone, correctness sees a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import correctness, gpu
from benchmarks.gpu import APART, PARTS, Outcome, Part, run_part, summary

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_every_benchmark_is_run_or_said_to_be_apart():
    files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    listed = [part.name for part in PARTS if part.name.startswith("bench_")]
    assert sorted([*listed, *APART]) == sorted(files)
    assert PARTS[0].name == "correctness"


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path):
    failed = run_part(Part("bench_layer", ("--device", "cpu", "--layers", "dsv4"), 60), tmp_path, 60)
    assert failed.failure == "exit code 2" and failed.records == []
    hung = run_part(Part("bench_layer", ("--device", "cpu"), 60), tmp_path, 0.5)
    assert hung.failure == "did not end within 0 s" or hung.failure == "did not end within 1 s"
    (tmp_path / "bench_layer-cuda.json").write_text("[{}]")  # of a run before
    assert run_part(Part("bench_layer", ("--device", "cpu", "--layers", "dsv4"), 60), tmp_path, 60).records == []


def test_the_budget_ends_the_run_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "PARTS", (Part("correctness", (), 10), Part("bench_gemm", (), 30)))
    monkeypatch.setattr(gpu, "run_part", lambda part, out, limit: ran.append(part) or Outcome(part, None, 1.0, []))
    assert gpu.main(["--out", str(tmp_path), "--budget", "12"]) == 0
    assert [part.name for part in ran] == ["correctness"]
    assert "bench_gemm: not run, the budget was spent" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run_part", lambda part, out, limit: Outcome(part, "exit code 9", 1.0, []))
    assert gpu.main(["--out", str(tmp_path)]) == 1


def test_the_summary_has_one_line_a_figure():
    record = {"name": "dsv3 fp8", "shape": "T4096", "metric": "throughput", "value": 512.34, "unit": "TFLOPS"}
    record |= {"baseline": "dsv3 bf16", "ratio": 1.4}
    other = record | {"metric": "time", "unit": "ms"}
    text = summary([Outcome(PARTS[1], None, 12.0, json.loads(json.dumps([record, other])))], PARTS[2:3])
    assert text.splitlines()[0] == "bench_layer: ok, 12 s"
    assert "512.3 TFLOPS  1.400 of dsv3 bf16" in text and "ms" not in text
    assert text.splitlines()[-1] == f"{PARTS[2].name}: not run, the budget was spent"


def test_correctness_is_right_here_and_sees_a_fault(monkeypatch, capsys):
    assert correctness.main(["--device", "cpu", "--repeats", "2"]) == 0
    assert capsys.readouterr().out.count("ok ") == 4
    calls = []

    def flaky(*args, **kwargs):
        calls.append(1)
        return correctness_gemm(*args, **kwargs) + (len(calls) == 6) * 1.0

    correctness_gemm = correctness.gemm
    monkeypatch.setattr(correctness, "gemm", flaky)
    assert correctness.main(["--device", "cpu", "--repeats", "5"]) == 1
    assert "WRONG gemm: " in capsys.readouterr().out


@pytest.mark.parametrize("bits", [1, 7])
def test_one_changed_bit_is_a_difference(bits):
    values = [torch.zeros(4), torch.zeros(4), torch.zeros(4).view(torch.int32).fill_(bits).view(torch.float32)]
    assert correctness.differing(iter(values).__next__, 2) == 1
