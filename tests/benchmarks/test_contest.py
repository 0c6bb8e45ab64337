"""The GEMM contests: what they record is right, on a CPU with the specification as candidates, and they refuse without
a GPU in one sentence."""

import argparse
import importlib
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import contest, peers
from benchmarks.harness import Report
from benchmarks.peers import BF16, Contest, Operands, with_order
from benchmarks.shapes import Problem
from fp8moe.kernels import tiles
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad

CPU = torch.device("cpu")
BENCHES = ("quantize", "gemm", "grouped_gemm", "grouped_wgrad")
PROBLEMS = (
    Problem("gemm", 256, 144, 272),
    Problem("grouped_gemm", 128, 144, 256, groups=3),
    Problem("gemm_columns", 144, 128, 272, "columns"),
    Problem("grouped_wgrad", 144, 128, 256, "columns", groups=3),
)


def own(p: Problem, x: Operands, contest: Contest):
    if p.op == "gemm":
        return lambda: gemm(x.a, x.b, out_dtype=torch.float32)
    if p.op == "grouped_gemm":
        return lambda: grouped_gemm(x.a, x.b, x.offsets, out_dtype=torch.float32)
    if p.op == "gemm_columns":
        return lambda: gemm(x.a, x.b, accumulate=contest.total)

    def call():
        grouped_wgrad(x.a, x.b, x.offsets, contest.total)
        return contest.total

    return call


def enter(p: Problem, x: Operands) -> Contest:
    shape = (p.groups, p.m, p.n) if p.groups > 1 else (p.m, p.n)
    found = Contest(total=torch.zeros(shape) if p.kind == "columns" else None, left_out={"te": "not installed"})
    found.candidates["gluon"] = own(p, x, found)
    found.candidates["half"] = lambda: 0.5 * own(p, x, found)()
    found.candidates[BF16] = own(p, x, found)
    return found


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.op)
def test_a_contest_records_speed_share_error_and_ratios(problem, capsys):
    report = Report(CPU)
    contest.contest_one(problem, enter, report, argparse.Namespace(device=CPU, repeats=3, warmup=1))
    records = {(r.name, r.metric, r.baseline): r for r in report.records}
    throughput = records[f"{problem.op} gluon", "throughput", BF16]
    assert throughput.value > 0 and throughput.ratio > 0
    assert records[f"{problem.op} {BF16}", "throughput", None].ratio is None
    assert records[f"{problem.op} gluon", "error", None].value <= 1e-12
    assert records[f"{problem.op} half", "error", None].value == pytest.approx(0.2)  # 1 - 2 * 0.5 / (1 + 0.25)
    assert records[f"{problem.op} gluon", "speed", "half"].unit == "x"
    assert "te is left out: not installed" in capsys.readouterr().out


def test_parts_of_a_group_are_that_group():
    p = PROBLEMS[3]
    x = Operands.make(p, CPU)
    a, b = contest.part(p, x, 2, slice(16, 144))
    columns = Fp8Tensor(x.a.data[:, 512:], x.a.scale[:, 4:])
    assert torch.equal(a, columns.dequantize()[16:144]) and b.shape == (128, 256)


def test_the_table_has_a_row_a_size_and_a_column_a_candidate(tmp_path):
    report = Report(CPU)
    report.add("gemm gluon", "M1", "throughput", 1000.0, "TFLOPS", baseline="bf16 cublas", ratio=1.5)
    report.add("gemm bf16 cublas", "M1", "throughput", 666.0, "TFLOPS")
    report.add("gemm gluon", "M2", "throughput", 900.0, "TFLOPS")
    report.add("gemm gluon", "M2", "error", 1e-6, "calc_diff")
    lines = contest.markdown(report.records).splitlines()
    assert lines[2:] == [
        "| size | gemm gluon TFLOPS | gemm bf16 cublas TFLOPS |",
        "|---|---|---|",
        "| M1 | 1000 (1.50x) | 666 |",
        "| M2 | 900 | - |",
    ]
    contest.write_beside(report.records, tmp_path / "out.json")
    assert (tmp_path / "out.md").read_text() == contest.markdown(report.records)
    svg = ElementTree.parse(tmp_path / "out.svg").getroot()
    tall = [float(bar.get("height")) for bar in svg.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    assert tall == pytest.approx([260, 260 * 0.666, 260 * 0.9, 0], abs=0.1)  # two sizes of two candidates, one missing
    words = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"M1", "M2", "gemm gluon", "gemm bf16 cublas", "1000", "0"} <= words
    assert ElementTree.fromstring(contest.bars([])).tag.endswith("svg")


def test_a_candidate_that_fails_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = Contest()

    def broken():
        raise ValueError("no such shape\nmore")

    found.enter("good", lambda: lambda: torch.ones(1))
    found.enter("broken", lambda: broken)
    found.enter("absent", lambda: importlib.import_module("no_such_library"))
    assert list(found.candidates) == ["good"]
    assert found.left_out == {"broken": "no such shape", "absent": "No module named 'no_such_library'"}


@pytest.mark.parametrize("name", BENCHES)
def test_without_a_gpu_a_benchmark_says_so_and_measures_nothing(name, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    bench = importlib.import_module(f"benchmarks.bench_{name}")
    assert bench.main(["--quick", "--json", str(tmp_path / "x.json")]) == 0
    assert "0 CUDA devices in use: nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        bench.main(["--device", "cuda"])
    assert end.value.code == 2 and "torch sees 0: use --device cpu" in capsys.readouterr().err


def test_json_of_a_run_is_a_list_of_records(tmp_path):
    report = Report(CPU, json_path=tmp_path / "r.json")
    contest.contest_one(PROBLEMS[0], enter, report, argparse.Namespace(device=CPU, repeats=3, warmup=0))
    report.finish()
    assert {row["metric"] for row in json.loads((tmp_path / "r.json").read_text())} >= {"throughput", "error", "speed"}


def test_orders_of_the_consumers_are_tried_where_they_are_asked_for():
    def op(k):
        return tiles.choose("gluon", "gemm", 4096, 7168, k, groups=1)

    table = op(2048)
    for order in ("free", "turns"):
        assert with_order(op, order)(2048) == replace(table, consumers=order)
    assert with_order(op, "pingpong")(2048) == tiles.Tile(128, 128, 6, 8, 4, consumers="pingpong")
    assert op(2048) == table
    with pytest.raises(ValueError, match="up to 2048, this one is 4096"):
        with_order(op, "pingpong")(4096)
    if not torch.cuda.is_available():
        for name in peers.ORDERED.values():
            with pytest.raises(ValueError, match="there is no GPU"):
                peers.implementation(name, "gemm", "gemm")
