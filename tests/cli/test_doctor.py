"""`fp8moe doctor` as a command: exit codes, the JSON file, a low limit, processes that it starts, wrong arguments."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fp8moe import __version__
from fp8moe.__main__ import main
from fp8moe.doctor import examine, gemm, gpu
from fp8moe.doctor.finding import Finding, Level

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert main(["doctor", f"run_dir={tmp_path}", "--json", str(file)]) == 0
    said = capsys.readouterr()
    for part in ("versions", "kernels", "gpu", "host", "storage", "gemm"):
        assert f"\n{part}\n" in f"\n{said.out}"
    assert said.err == "" and f"fp8moe {__version__}, Python" in said.out and "network" not in said.out
    found = json.loads(file.read_text())
    assert found["world_size"] == 1 and {one["level"] for one in found["findings"]} <= {"ok", "advice"}
    assert found["figures"]["versions"]["fp8moe"] == __version__ and list(tmp_path.iterdir()) == [file]


def test_advice_leaves_0_and_what_prevents_a_run_gives_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = Finding("gpu", "it is warm", Level.ADVICE, "cool it")
    monkeypatch.setattr(gpu, "check_gpus", lambda seen: [advice])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("to fix (X: prevents a run)\n  1. ! cool it\n")
    stops = [Finding("gemm", f"wrong {i}", Level.STOP, "mend it") for i in range(2)]
    monkeypatch.setattr(gemm, "check_correct", lambda device: stops)
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert said.out.endswith("  1. X mend it\n  2. X mend it\n  3. ! cool it\n")
    assert said.err == "fp8moe: 2 findings prevent a run: see the lines with X above\n"
    assert examine.gemm is gemm


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runs/mine"], "'runs/mine' is no argument of doctor: write run_dir=PATH"),
        (["run_dir="], "'run_dir=' is no argument of doctor"),
        (["steps=3"], "'steps=3' is no argument of doctor"),
        (["--timeout", "0"], "--timeout=0 must be from 1 to 86400 seconds: use 120"),
        (["--timeout", "nan"], "--timeout=nan must be from 1"),
        (["run_dir=a", "run_dir=b"], "unrecognized arguments: run_dir=b"),
    ],
)
def test_wrong_arguments(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_help_names_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "fp8moe doctor run_dir=runs/mine" in capsys.readouterr().out


def test_processes_of_this_machine_with_too_few_files(tmp_path: Path) -> None:
    """The launcher returns what rank 0 found, once; the processes inherit the limit."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fp8moe", "doctor", "--nproc", "2", f"run_dir={tmp_path / 'run'}"],
        env=environ, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == "fp8moe: 1 finding prevents a run: see the lines with X above\n"
    assert "  X a process may open 400 files\n" in done.stdout and "\n  2 ranks: " not in done.stdout
    assert "    2 ranks: all-reduce " in done.stdout and "(`ulimit -n 65536`)" in done.stdout
    assert list(tmp_path.iterdir()) == []
