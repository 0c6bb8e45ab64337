"""The library of the device: built once, and kept with pytest's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda import guard

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := guard.why_not():
        pytest.skip(reason)
    kept = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("host_gpu") if kept is None else Path(kept.mkdir("host_gpu"))
    return guard.build(folder, HERE / "device.cpp", HERE / "streams.h")
