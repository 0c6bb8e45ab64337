"""What a layer launches on a fake `cuda`, traced once a session in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import guard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def layer_launches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[str]]]:
    """[phase, op, kernel] of each launch by kind of layer; see `layer_trace`."""
    if reason := guard.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("layer")
    kept = getattr(request.config, "cache", None)
    library = guard.build(folder if kept is None else Path(kept.mkdir("fake_cuda")))
    command = [sys.executable, "-m", "tests.ptx.layer_trace", str(folder / "trace.json"), "--guard", str(library)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    launches: dict[str, list[list[str]]] = json.loads((folder / "trace.json").read_text())
    return launches
