"""What a GPU machine with torch, Triton, NumPy and pytest alone can start: `make test-gpu` and `make bench-gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As if these were not installed: everything else that set-up brings.
BARE = """
import importlib.abc, runpy, sys
ABSENT = {"hydra", "omegaconf", "antlr4", "yaml", "tokenizers", "tqdm", "transformers", "safetensors", "hypothesis",
          "pytest_timeout", "matplotlib", "scipy", "pandas"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def bare(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_the_tests_for_a_gpu_are_found() -> None:
    run = bare(
        "pytest",
        "-m",
        "gpu",
        "tests/kernels",
        "tests/benchmarks/test_harness.py",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert "test_gluon.py::test_rows_by_blocks" in run.stdout and "error" not in run.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["gemm", "grouped_gemm", "grouped_wgrad", "quantize", "step"])
def test_a_benchmark_starts(name: str) -> None:
    run = bare(f"benchmarks.bench_{name}", "--device", "cpu", "--quick")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "nothing was measured" in run.stdout
