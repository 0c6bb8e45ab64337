"""Where kernels run in the tests: interpreted on the CPU, or, under `make test-gpu`, on the GPU.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before anything else; `make test-gpu` sets it to
0, and what compiles kernels does so in processes of its own.
"""

import faulthandler
import os
from collections.abc import Generator, Iterator

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matmul in deterministic mode

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
STDERR = pytest.StashKey[int]()
GRACE = 60.0  # seconds


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # what a test writes to 2 is captured


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A minute past a test's timeout, print all stacks and end the process: the timeout is a signal, and Python acts on
    it only once a call in C returns."""
    if item.config.pluginmanager.hasplugin("timeout"):
        mark = item.get_closest_marker("timeout")
        limit = float(mark.args[0] if mark else item.config.getini("timeout"))
        faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test of Triton ops, with that back end in force and unwritten memory full of NaN."""
    import torch

    from fp8moe.kernels import backend

    name: str = request.param
    if (name == "cpu") != INTERPRETED or (name == "cuda" and not torch.cuda.is_available()):
        pytest.skip("the CPU interprets kernels, a GPU runs them: `make test` and `make test-gpu`")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    backend.set_backend("triton")
    yield name
    backend.set_backend(None)
    torch.use_deterministic_algorithms(False)
