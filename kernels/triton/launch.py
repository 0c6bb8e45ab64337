"""Launches of Triton's and Gluon's kernels, without Triton's search for a kernel that it has found before.

`kernel[grid](...)` binds the arguments, asks of each what a kernel is specialized for, writes the answers and the
options as strings, and looks the compiled kernel up by them: 10 to 30 microseconds of the host, more than some kernels
run. What Triton asks is little, and `launch` asks the same: of a tensor its dtype and whether its address is a multiple
of 16, of a number whether it is 1, a multiple of 16, wider than 32 bits, of a descriptor its dtype and block; constants
count as they are. The first launch of a kind is Triton's, which compiles, checks, and returns the kernel; later ones go
to that kernel's launcher as `JITFunction.run` of Triton 3.6 to 3.8 does.

A key may be finer than Triton's, which then returns a kernel that it has; it is never coarser. Arguments of any other
type, an interpreted kernel, and launches that a profiler hooks take Triton's way every time, and so does every launch
under FP8MOE_LAUNCH=triton, should another release call its launcher otherwise. Refused: a kernel called with its
arguments already packed; what packs them differs between Triton's releases.

A thread's first launch may be one with descriptors: autograd's is, of a layer whose backward begins with a GEMM.
Triton's launcher gives a thread without a CUDA context the device's, but encodes descriptors before, which needs one.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

LAUNCH_VARIABLE = "FP8MOE_LAUNCH"


@dataclass(frozen=True, eq=False)
class Block:
    """The tiles that a descriptor moves: their shape, and for Gluon how they lie in shared memory. Made once each."""

    shape: list[int]
    layout: Any = None


class Descriptor(TensorDescriptor):
    """Triton's descriptor, made without its checks: a `block` known to fit, strides of multiples of 16 bytes."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: Block) -> None:
        self.base, self.shape, self.strides, self.block, self.block_shape = base, shape, strides, block, block.shape
        self.padding, self.round_f32_to_tf32 = "zero", False


@functools.cache
def block_of(rows: int, columns: int) -> Block:
    """Tiles of plain Triton, whose layout is the compiler's."""
    return Block([rows, columns])


@dataclass(frozen=True)
class _Found:
    """A compiled kernel, what its launcher takes of it, and its constants in the order of its parameters."""

    compiled: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


_found: dict[tuple[Any, ...], _Found] = {}
_thread = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`: parameters by position, constants and options by name."""
    if not hasattr(_thread, "entered") and torch.cuda.is_initialized():
        _thread.entered = True
        enter_context(torch.cuda.current_device())
    kinds = kinds_of(args) if _direct() and isinstance(kernel, JITFunction) else None
    if kinds is None:
        kernel[grid](*args, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    # `run` is among them so that who replaces Triton's is asked each time.
    key = (id(kernel), type(kernel).run, device, *kinds, *constants.items())
    found = _found.get(key)
    if found is None or _hooked():
        _launch_by_triton(key, kernel, grid, args, constants)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    found.run(x, y, z, stream, found.function, found.metadata, None, None, None, *args, *found.constants)


def enter_context(device: int) -> None:
    """Make `device`'s primary context current in this thread, if it has none."""
    driver_api, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    driver_api.cuCtxGetCurrent(ctypes.byref(context))
    if context.value is None:
        status = driver_api.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        if status or (status := driver_api.cuCtxSetCurrent(context)):
            raise RuntimeError(f"the CUDA driver gives this thread no context of device {device}: error {status}")


def kinds_of(args: tuple[Any, ...]) -> list[Any] | None:
    """What a kernel may be specialized for in its arguments, one after the other; None where only Triton knows."""
    kinds: list[Any] = []
    for value in args:
        kind = type(value)
        if kind is int:
            kinds.append(1 if value == 1 else 2 if value & 15 else 16)
            if not -(2**31) <= value < 2**31:
                kinds.append("wide" if value < 2**63 else "unsigned")
        elif kind is Tensor or kind is torch.nn.Parameter:
            kinds.append(value.dtype)
            if value.data_ptr() & 15:
                kinds.append("unaligned")
        elif value is None or kind is float:
            kinds.append(kind)
        elif (block := getattr(value, "block", None)) is not None:
            kinds.append(block)
            kinds.append(value.base.dtype)
        else:
            return None
    return kinds


@functools.cache
def _direct() -> bool:
    return os.environ.get(LAUNCH_VARIABLE) != "triton"


def _launch_by_triton(
    key: tuple[Any, ...], kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    compiled = kernel[grid](*args, **constants)
    if compiled is None:  # noted by a test, not compiled
        return
    given, rest = kernel.params[: len(args)], kernel.params[len(args) :]
    assert not any(one.is_constexpr for one in given) and all(one.is_constexpr for one in rest), kernel.__name__
    ordered = tuple(constants[one.name] for one in rest)
    _found[key] = _Found(compiled, compiled.run, compiled.function, compiled.packed_metadata, ordered)


def _hooked() -> bool:
    """Whether somebody wants to hear of launches; Triton's hooks are chains, or None where they are taken out."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
