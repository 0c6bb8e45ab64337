"""Where kernels run in the tests: interpreted on the CPU, or, under `make test-gpu`, on the GPU.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before anything else; `make test-gpu` sets it to
0, and what compiles kernels does so in processes of its own.
"""

import faulthandler
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matmul in deterministic mode
# A forked rank leaves the objects of the whole test run to its parent: to collect them it would copy all their pages.
os.register_at_fork(after_in_child=gc.freeze)
# Python looks for cycles after so many new objects, 700 by itself: a tenth of the time of tests that make many.
gc.set_threshold(50_000, 20, 50)

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
STDERR = pytest.StashKey[int]()
GRACE = 60.0  # seconds
# Files of more than about five seconds of processor time, the longest first, as `make test` hands them out: a long one
# that begins last leaves the other worker idle. `pytest --durations` of a file says when its place has changed.
LONGEST = (
    "ptx/test_ptx.py",
    "kernels/test_sm90.py",
    "train/test_pipeline.py",
    "host_gpu/test_commands.py",
    "train/test_context.py",
    "faults/test_faults.py",
    "docs/test_docs.py",
    "cli/test_launch.py",
    "train/test_resume.py",
    "plan/test_memory.py",
    "train/test_zero.py",
    "post/test_grpo.py",
    "generate/test_captured.py",
    "launch/test_container.py",
    "plan/test_search.py",
    "kernels/test_triton_message.py",
    "train/test_reshard.py",
    "train/test_rollback.py",
    "kernels/test_library.py",
    "train/test_preempt.py",
    "fake_cuda/test_step.py",
    "train/test_captured.py",
    "data/test_build.py",
    "plan/test_faster.py",
    "parallel/dispatch/test_dispatchers.py",
    "kernels/test_triton_permute.py",
    "post/test_rollout_server.py",
    "post/test_reference.py",
    "train/test_consistency.py",
    "cli/test_plan.py",
    "kernels/test_triton_gemm.py",
    "launch/test_wheel.py",
    "cli/test_bad_settings.py",
    "generate/test_commands.py",
    "interop/test_train_from.py",
    "train/test_loop.py",
    "kernels/test_triton_hardware.py",
    "generate/test_decode.py",
    "kernels/test_triton_quantize.py",
    "benchmarks/test_bare_machine.py",
    "train/test_detail.py",
    "train/test_step.py",
    "schedule/test_check.py",
    "model/test_phases.py",
    "train/checkpoint/test_bad_input.py",
    "post/distill/test_taught.py",
    "kernels/test_triton_norm.py",
    "plan/test_rollout_memory.py",
    "train/test_sft.py",
    "benchmarks/test_long_context.py",
    "model/test_stage.py",
    "post/distill/test_own.py",
    "test_mutants.py",
    "test_architecture_report.py",
    "cli/test_resume.py",
    "cli/test_compose.py",
    "parallel/dispatch/test_soak.py",
    "benchmarks/test_pipeline_gpu.py",
    "train/test_families.py",
    "post/test_replay.py",
    "fake_cuda/test_launching.py",
    "kernels/test_triton_route.py",
    "train/test_config.py",
    "generate/test_groups.py",
    "cli/test_security.py",
    "plan/test_layouts.py",
    "plan/test_fit.py",
    "train/checkpoint/test_interrupted.py",
    "kernels/test_triton_swiglu.py",
    "train/test_interfaces.py",
    "cli/test_numerics.py",
    "kernels/test_triton_e5m6.py",
    "kernels/test_backend_choice.py",
    "train/test_init_from.py",
    "cli/test_recipes.py",
    "cli/test_doctor.py",
    "benchmarks/test_bench_step.py",
    "kernels/test_clamped_swiglu.py",
    "train/checkpoint/test_urls.py",
    "kernels/test_triton_grouped_mm.py",
    "test_architecture.py",
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
    gc.collect(1)  # of what the tests before have left; what stays, no collection within the test looks at
    gc.freeze()
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
