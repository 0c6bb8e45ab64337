"""A GPU that is pretended: launchers and Triton's host code run as on a Hopper, only the last call does nothing.

Within `pretended_gpu()` every tensor lies on the CPU and says that it is on `cuda:0`, so that ops choose what they
choose on a GPU; PyTorch's own ops run on the CPU, on sizes so small that their time is the call's. A kernel is not
compiled: Triton binds, specializes and looks up as always, and its CUDA launcher encodes descriptors and hands over
arguments, to a function in place of the driver's that counts. Values are whatever memory holds.

What is left out, 3 to 5 microseconds a launch: the C half of Triton's launcher, CUDA's driver, the caching allocator.
FakeTensors, which `tests/fake_cuda` uses to count launches, were refused: each of their ops takes ten times as long.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fp8moe.kernels import backend

CUDA = torch.device("cuda", 0)
HOPPER = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0)
FACTORIES = ("empty", "empty_strided", "zeros", "ones", "full", "arange", "tensor")
_STREAM = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
DESCRIPTOR = {"swizzle": 3, "elem_size": 1, "elem_type": 1, "block_size": [64, 128], "fp4_padded": False}


@dataclass
class Launches:
    """How many kernels of this project were launched."""

    count: int = 0

    def add(self, *_: Any) -> None:
        self.count += 1


class _Driver:
    """What Triton asks of its CUDA driver when it launches."""

    def __init__(self, launches: Launches) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            launch=launches.add,
            build_signature_metadata=lambda signature: b"",
            fill_tma_descriptor_tiled=lambda *args: 0,
            fill_tma_descriptor=lambda *args: 0,  # its name in Triton 3.6
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compiled(function: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *_: Any) -> Any:
    """In place of `JITFunction._do_compile`: Triton's own kernel object and launcher, of no code."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler.compiler import CompiledKernel

    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.src = function.ASTSource(function, signature, constants, {})
    count = sum(isinstance(kind, str) and kind.startswith("tensordesc") for kind in signature.values())
    scratch = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
    aligned = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
    kernel.metadata = SimpleNamespace(
        tensordesc_meta=[DESCRIPTOR] * count, launch_cooperative_grid=False, launch_pdl=False, instrumentation_mode="",
        num_ctas=1, **scratch, **aligned,
    )  # fmt: skip
    kernel.packed_metadata, kernel.module, kernel.function, kernel.name = (), 0, 0, function.__name__
    kernel._run = CudaLauncher(kernel.src, kernel.metadata)
    function.device_caches[device][0][key] = kernel
    return kernel


def _without_device(factory: Any) -> Any:
    return lambda *args, device=None, **kwargs: factory(*args, **kwargs)


def device_patches() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of what makes tensors, PyTorch and the choice of back ends say Hopper."""
    return [
        (torch.Tensor, "device", property(lambda tensor: CUDA)),
        (torch.Tensor, "is_cuda", property(lambda tensor: True)),
        *((torch, name, _without_device(getattr(torch, name))) for name in FACTORIES),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: HOPPER),
        (torch.cuda, "get_device_name", lambda device=None: HOPPER.name),
        (torch.cuda, "device_of", lambda tensor: ExitStack()),
        (torch.cuda, "Stream", lambda *_: _STREAM),
        (torch.cuda, "stream", lambda stream: ExitStack()),
        (torch.cuda, "current_stream", lambda device=None: _STREAM),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (backend, "why_not", lambda name: None),
    ]


def _patches(launches: Launches) -> list[tuple[Any, str, Any]]:
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    mm = torch.mm
    if hasattr(nvidia, "PyKernelArg"):
        launcher: tuple[Any, str, Any] = nvidia, "PyKernelArg", lambda **kwargs: None
    else:  # Triton 3.6 compiles a launcher for each kernel, linked with the driver's library
        launcher = nvidia, "compile_module_from_src", lambda **kwargs: SimpleNamespace(launch=launches.add)

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return mm(a, b) if out_dtype is None else mm(a, b).to(out_dtype)  # PyTorch has it for GPUs alone

    def grouped_mm(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], w.shape[-1])  # a CPU loops over groups whose sizes are nobody's here

    return [
        *device_patches(),
        (torch, "mm", wide_mm),
        (torch.nn.functional, "grouped_mm", grouped_mm),
        (driver, "_active", _Driver(launches)),
        launcher,
        (nvidia, "library_dirs", list),
        (JITFunction, "_do_compile", _compiled),
    ]


@contextmanager
def pretended_gpu() -> Iterator[Launches]:
    """Within the block this process has a Hopper. For a process of its own: what Triton keeps of it stays behind.

    ValueError where kernels are interpreted, or where there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the host time of launches is Triton's as well, which is not installed: install triton")
    if importlib.import_module("triton").knobs.runtime.interpret:
        raise ValueError("interpreted kernels are not launched: unset TRITON_INTERPRET")
    launches = Launches()
    with ExitStack() as stack:
        for target, name, replacement in _patches(launches):
            stack.enter_context(mock.patch.object(target, name, replacement))
        backend.set_backend("gluon")
        stack.callback(backend.set_backend, None)
        yield launches
