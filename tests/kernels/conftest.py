"""Every test of a kernel runs on memory filled with NaN: what is allocated and not written shows."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from fp8moe.kernels import backend

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.kernels.interpreter import speed_up

    speed_up()


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hopper() -> Iterator[str]:
    """The device, with the Gluon back end in force; skips where it can't run."""
    if reason := backend.why_not("gluon"):
        pytest.skip(reason)
    backend.set_backend("gluon")
    yield "cuda"
    backend.set_backend(None)
