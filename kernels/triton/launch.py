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

Most of a launch follows from the shapes of its tensors: grid, numbers, constants, what descriptors say. An op prepares
that once for each shape (`by_shapes`, `Prepared`), and a launch asks its tensors' dtypes and addresses alone. How many
are kept is bounded, since experts see another number of rows in every batch.

A thread's first launch may be one with descriptors: autograd's is, of a layer whose backward begins with a GEMM.
Triton's launcher gives a thread without a CUDA context the device's, but encodes descriptors before, which needs one.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

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


@functools.cache
def block_of(*shape: int) -> Block:
    """Tiles of plain Triton, whose layout is the compiler's."""
    return Block(list(shape))


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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> _Found | None:
    """`kernel[grid](*args, **constants)`: parameters by position, constants and options by name.

    What was launched is returned, where a launch of the same kind may go past Triton's search.
    """
    _enter()
    kinds = kinds_of(args) if _direct() and isinstance(kernel, JITFunction) else None
    if kinds is None:
        kernel[grid](*args, **constants)
        return None
    active = driver.active
    device = active.get_current_device()
    # `run` is among them so that who replaces Triton's is asked each time.
    key = (id(kernel), type(kernel).run, device, *kinds, *constants.items())
    found = _found.get(key)
    if found is None or _hooked():
        return _launch_by_triton(key, kernel, grid, args, constants)
    stream = active.get_current_stream(device)
    found.run(*_three(grid), stream, found.function, found.metadata, None, None, None, *args, *found.constants)
    return found


KEPT = 1024  # launches that one function prepares
_prepare: list[Any] = []
Prepare = TypeVar("Prepare", bound=Callable[..., Any])


def by_shapes(prepare: Prepare) -> Prepare:
    """Keep what a function of sizes and strides prepares, the last KEPT of it."""
    _prepare.append(functools.lru_cache(maxsize=KEPT, typed=True)(prepare))
    return cast(Prepare, _prepare[-1])


def forget() -> None:
    """Prepare all launches anew: for who has changed what they follow from beside their shapes, as tests do."""
    for kept in _prepare:
        kept.cache_clear()


Layout = tuple[torch.Size, tuple[int, ...], int]  # of a tensor: `layout_of`
Described = tuple[list[int], list[int], Block]  # shape, strides and tiles of what a descriptor moves


class Prepared:
    """A launch but for its tensors, which are the kernel's first parameters; then come `numbers`, then constants.

    described: what descriptors of the first tensors say, one each, of class `descriptor`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *numbers: float,
        described: tuple[Described, ...] = (),
        descriptor: Callable[..., Any] = Descriptor,
        **constants: Any,
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._described, self._descriptor, self._count = tuple(zip(*described, strict=True)), descriptor, len(described)
        self._asks_triton = not isinstance(kernel, JITFunction)  # but a kernel that is interpreted, or stands for one
        self._found: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it on tensors of the shapes and strides for which it was prepared."""
        kinds: list[Any] = [JITFunction.run]  # so that who replaces Triton's is asked each time
        args: Any = tensors
        if self._count:
            _enter()
            args = list(map(self._descriptor, tensors, *self._described))
            kinds += [one.base.dtype for one in args]
            args += (tensors := tensors[self._count :])
        for one in tensors:
            if one is None:
                kinds.append(None)
                continue
            kinds.append(one.dtype)
            if one.data_ptr() & 15:
                kinds.append("unaligned")
        if self._asks_triton:
            self._kernel[self._grid](*args, *self._numbers, **self._constants)
            return
        active = driver.active
        kinds.append(device := active.get_current_device())
        found = self._found.get(key := tuple(kinds))
        if found is None or _hooked():
            self._launch(key, args)
            return
        x, y, z, run, function, metadata, rest = found
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *rest)

    def _launch(self, key: tuple[Any, ...], args: Any) -> None:
        found = launch(self._kernel, self._grid, *args, *self._numbers, **self._constants)
        if found is not None:
            rest = (*self._numbers, *found.constants)
            self._found[key] = (*_three(self._grid), found.run, found.function, found.metadata, rest)


def layout_of(tensor: Tensor) -> Layout:
    """How a tensor lies: its shape, its strides, and by how much its address passes a multiple of 16 bytes."""
    return tensor.shape, tensor.stride(), tensor.data_ptr() & 15


def is_contiguous(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """`Tensor.is_contiguous` of a tensor that lies so."""
    return all(shape[i] == 1 or stride == shape[i + 1 :].numel() for i, stride in enumerate(strides))


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return grid if len(grid) == 3 else (*grid, 1, 1)[:3]


def _enter() -> None:
    """Before a thread's first launch give it the device's context."""
    if not hasattr(_thread, "entered") and torch.cuda.is_initialized():
        _thread.entered = True
        enter_context(torch.cuda.current_device())


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
) -> _Found | None:
    compiled = kernel[grid](*args, **constants)
    if compiled is None:  # noted by a test, not compiled
        return None
    given, rest = kernel.params[: len(args)], kernel.params[len(args) :]
    assert not any(one.is_constexpr for one in given) and all(one.is_constexpr for one in rest), kernel.__name__
    ordered = tuple(constants[one.name] for one in rest)
    found = _found[key] = _Found(compiled, compiled.run, compiled.function, compiled.packed_metadata, ordered)
    return found


def _hooked() -> bool:
    """Whether somebody wants to hear of launches; Triton's hooks are chains, or None where they are taken out."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
