"""`make test-gpu` without a GPU is a failure of one sentence, and no test is skipped in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = """#!/bin/sh
case "$1" in -c) exec {python} "$@" ;; esac
echo "$*" >> {log}
"""


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_tests_of_a_gpu_fail_without_one(gpus: int, tmp_path: Path) -> None:
    """With a torch that sees `gpus` GPUs and a Python that notes what it would run."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"__version__ = '2.0+x'\nclass cuda:\n    device_count = staticmethod(lambda: {gpus})\n"
    )
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "VENV=", f"PYTHON={fake}", "test-gpu"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    ran = log.read_text().splitlines() if log.exists() else []
    if gpus:
        assert (done.returncode, ran) == (
            0,
            [
                "-m pytest -m gpu tests/kernels tests/layers/attention tests/layers/test_captured_layer.py "
                "tests/benchmarks/test_harness.py"
            ],
        ), done.stderr
        return
    assert done.returncode != 0 and ran == []
    said = "make test-gpu needs at least 1 CUDA GPU and torch 2.0+x sees 0: use a GPU machine and a CUDA build of torch"
    assert any(line.startswith(said) for line in done.stderr.splitlines()) and "Traceback" not in done.stderr
