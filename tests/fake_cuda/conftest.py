"""The traces that the tests read: made once a session, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_cuda import guard
from tests.fake_cuda.trace import Trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """`traces("fp8", 4096)`, or ("fp8", "one_hop", "fixed") for a dispatch between ranks."""
    if reason := guard.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("fake_cuda")
    kept = getattr(request.config, "cache", None)
    library = guard.build(folder if kept is None else Path(kept.mkdir("fake_cuda")))
    command = [sys.executable, "-m", "tests.fake_cuda", str(folder), "--guard", str(library)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return lambda *key: Trace.load(folder / f"{'-'.join(map(str, key))}.json")
