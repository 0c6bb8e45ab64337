"""The host's time is measured without a GPU, by the launchers of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import bench_host
from benchmarks.pretended_gpu import pretended_gpu

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    """The benchmark in a process of its own: what it pretends stays behind in Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.bench_host", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_counts_the_launches_of_a_layer(tmp_path):
    file = tmp_path / "host.json"
    printed = run("--repeats", "2", "--warmup", "1", "--profile", "3", "--json", str(file))
    found = {(r["name"], r["metric"]): r["value"] for r in json.loads(file.read_text())}
    for kind, fewest in (("bf16", 60), ("fp8", 70)):
        name = f"{bench_host.NAME} {kind}"
        launches = found[name, "launches"]
        assert fewest <= launches <= 100, "about as many as a trace of an H100 has"
        assert found[name, "host time a launch"] == pytest.approx(found[name, "host time"] * 1e3 / launches)
    assert [found[f"messages {kind}", "launches"] for kind in ("bf16", "fp8")] == [19, 20]
    assert found["messages fp8, two hops", "launches"] == 32
    assert "tottime" in printed
    for name in ("message in turn", "message by a thread"):
        assert 0 < found[name, "message launched"] < found[name, "host time"]


def test_interpreted_kernels_are_no_launches():
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are not interpreted here")
    with (
        pytest.raises(ValueError, match="interpreted kernels are not launched: unset TRITON_INTERPRET"),
        pretended_gpu(),
    ):
        pass
