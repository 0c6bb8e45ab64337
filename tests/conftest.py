"""Where kernels run in the tests: interpreted on the CPU, or, under `make test-gpu`, on the GPU.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before anything else; `make test-gpu` sets it to
0, and what compiles kernels does so in processes of its own.
"""

import faulthandler
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matmul in deterministic mode

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
STDERR = pytest.StashKey[int]()
GRACE = 60.0  # seconds
# Files of more than about ten seconds, the longest first, as `make test` hands them out: a long one that begins last
# leaves the other worker idle. `pytest --durations` of a file says when its place has changed.
LONGEST = (
    "ptx/test_ptx.py",
    "kernels/test_sm90.py",
    "train/test_resume.py",
    "cli/test_launch.py",
    "train/test_zero.py",
    "train/test_pipeline.py",
    "plan/test_memory.py",
    "docs/test_docs.py",
    "faults/test_faults.py",
    "train/test_context.py",
    "train/test_captured.py",
    "post/distill/test_taught.py",
    "post/test_grpo.py",
    "post/distill/test_command.py",
    "post/test_rollout_server.py",
    "fake_cuda/test_step.py",
    "interop/test_memory.py",
    "parallel/dispatch/test_dispatchers.py",
    "parallel/dispatch/test_soak.py",
    "parallel/test_hang.py",
    "train/test_preempt.py",
    "train/test_consistency.py",
    "train/test_pipeline_faults.py",
    "train/test_rollback.py",
    "train/test_loop.py",
    "train/test_step.py",
    "benchmarks/test_bare_machine.py",
    "benchmarks/test_bench_host.py",
    "kernels/test_triton_permute.py",
    "kernels/test_triton_hardware.py",
    "kernels/test_triton_swiglu.py",
    "kernels/test_triton_quantize.py",
    "kernels/test_library.py",
    "cli/test_bad_settings.py",
    "cli/test_security.py",
    "cli/test_numerics.py",
    "cli/test_resume.py",
    "data/test_build.py",
    "launch/test_wheel.py",
    "test_mutants.py",
    "test_architecture_report.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # what a test writes to 2 is captured


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A minute past a test's timeout, print all stacks and end the process: the timeout is a signal, and Python acts on
    it only once a call in C returns."""
    if item.config.pluginmanager.hasplugin("timeout"):
        mark = item.get_closest_marker("timeout")
        if limit := mark.args[0] if mark else item.config.getini("timeout"):
            faulthandler.dump_traceback_later(float(limit) + GRACE, exit=True, file=item.config.stash[STDERR])
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
