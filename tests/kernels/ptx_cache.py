"""PTX of kernels for sm_90a, compiled once for the compile gate and for `tests.ptx`, which run at the same time.

Both launch the same kernels, so both compile without ptxas and keep the PTX in one folder, build/kernels, by what
Triton tells its kernels apart by: source, options, versions and environment. That stays (`make clean` removes it):
compiling takes longer than all that is read out of the code. The folder is no cache that Triton could run from, since
only what the gate has asked for has machine code beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager, get_cache_manager, triton_key

FOLDER = Path(__file__).resolve().parents[2] / "build" / "kernels"
TARGET = GPUTarget("cuda", 90, 32)
KEPT = (".json", ".ttir", ".ttgir", ".ptx", ".cubin")
_PTXAS = CUDABackend.make_cubin


class Pretender:
    """Stands in for Triton's CUDA driver where there is none: a Hopper GPU that is asked for its kind only."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class PtxCache(FileCacheManager):
    """Keeps what is read of a kernel: printing the compiler's other steps takes time."""

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        return super().put(data if filename.endswith(KEPT) else "", filename, binary)


def prepare() -> None:
    """In this process and its children: a driver that only says what it is, no ptxas, and the common folder."""
    os.environ.setdefault("MLIR_DISABLE_MULTITHREADING", "1")  # a kernel is too small for a second thread
    os.environ.setdefault("TRITON_CACHE_DIR", str(FOLDER))
    driver.set_active(Pretender())
    knobs.cache.manager_class = PtxCache
    CUDABackend.make_cubin = lambda *_: b""
    triton_key()  # reads the whole compiler, so here once for all processes


def machine_code(compiled: CompiledKernel, options: dict[str, Any]) -> bytes:
    """The cubin that ptxas makes of a kernel's PTX, kept beside it."""
    if not compiled.asm["cubin"]:
        backend, metadata = make_backend(TARGET), compiled.metadata
        made = _PTXAS(backend, compiled.asm["ptx"], metadata._asdict(), backend.parse_options(options), TARGET.arch)
        get_cache_manager(compiled.hash).put(made, f"{compiled.src.name[:150]}.cubin")
        return made
    return compiled.asm["cubin"]
