"""Every test of a kernel runs on memory filled with NaN: what is allocated and not written shows."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

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


@pytest.fixture(autouse=True)
def launches_prepared_anew() -> None:
    """A test may change what launches follow from: constants of a module, the table of tiles, a kernel."""
    if launching := sys.modules.get("fp8moe.kernels.triton.launch"):
        launching.forget()


@pytest.fixture
def hopper() -> Iterator[str]:
    """The device, with the Gluon back end in force; skips where it can't run."""
    if reason := backend.why_not("gluon"):
        pytest.skip(reason)
    backend.set_backend("gluon")
    yield "cuda"
    backend.set_backend(None)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A kernel on a pretended GPU, and what happens to it: Triton's launches, and those that went past it."""
    import triton.language as tl
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fp8moe.kernels.triton import launch as launching
    from tests.kernels.ptx_cache import Pretender

    def nothing(a, b, SIZE: tl.constexpr, FLAG: tl.constexpr):
        """A kernel that is never compiled."""

    past: list[Any] = []
    compiled = SimpleNamespace(run=lambda *args: past.append(args), function=7, packed_metadata="packed")
    by_triton: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        by_triton.append((grid, args, constants))
        return compiled

    monkeypatch.setattr(driver, "_active", Pretender())
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launching, "_found", {})
    return SimpleNamespace(function=JITFunction(nothing), by_triton=by_triton, past=past)
