"""The one choice of a back end: what is refused, what is said, and that every op has its implementation."""

import importlib
import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.quantize import quantize_rows


@pytest.fixture(autouse=True)
def undo() -> Iterator[None]:
    backend.set_backend(None)
    yield
    backend.set_backend(None)


def test_the_reference_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.resolve() == "reference"


def test_an_unknown_back_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="back end 'cutlass' does not exist in this version: use reference"):
        backend.set_backend("cutlass")
    monkeypatch.setenv(backend.VARIABLE, "abacus")
    with pytest.raises(ValueError, match="'abacus'"):
        quantize_rows(torch.zeros(2, 16))
    backend.set_backend("reference")  # explicit choice beats the environment
    quantize_rows(torch.zeros(2, 16))


def test_the_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(backend.VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        quantize_rows(torch.zeros(2, 16))
        quantize_rows(torch.zeros(2, 16))
        backend.resolve()
    assert [record.getMessage() for record in caplog.records] == ["kernels: back end reference (FP8MOE_BACKEND)"]


@pytest.mark.parametrize("name", backend.OPS)
def test_every_op_is_implemented_with_its_signature(name: str) -> None:
    implementation = backend.op(name)
    module = implementation.__module__.rpartition(".")[2]
    public = getattr(importlib.import_module(f"fp8moe.kernels.{module}"), name)
    ours, theirs = inspect.signature(public).parameters, inspect.signature(implementation).parameters
    assert list(ours) == list(theirs)
    assert [(p.kind, p.default) for p in ours.values()] == [(p.kind, p.default) for p in theirs.values()]


def test_a_run_on_the_reference_loads_no_triton() -> None:
    """Some machines have none, and it is a tenth of a start."""
    code = "import sys, fp8moe.train.loop; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
