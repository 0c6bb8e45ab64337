"""Records what a program on fake `cuda` tensors would do on a GPU.

`Recorder` sees every ATen op below autograd: views and allocations launch nothing, the rest launches one kernel, or as
many as `SEVERAL` says. Ops that bring numbers to the host are waits; their results are invented (ones), so a program
whose shapes depend on them shows itself. The project's own ops run their real launchers (`launching`), whose kernels
report here, and whose ATen ops are counted as part of the op.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp8moe.kernels.fp8 import BLOCK_TILE, E5m6Tensor, Fp8Tensor
from tests.fake_cuda.trace import Call, Launch, Trace, Wait

ROOT = Path(__file__).resolve().parents[2]
# Kernels of ATen ops that launch more than one on a GPU, as torch 2.11 does on an H100.
SEVERAL = {
    "sort": 4,
    "topk": 2,
    "cumsum": 2,
    "index_put_": 2,
    "linalg_vector_norm": 2,
    "bincount": 3,
    "_scaled_dot_product_cudnn_attention_backward": 3,
}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
NO_LAUNCH = ALLOCATIONS | {"is_pinned", "_pin_memory", "record_stream", "_has_compatible_shallow_copy_type", "device"}
# Their first tensor is written and not read, or only asked for its shape.
WRITE_ONLY = {
    *("fill_", "zero_", "copy_", "random_", "normal_", "uniform_"),
    *("full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"),
}
GATHERS = {"index", "index_select", "gather", "embedding"}  # of their first tensor they read as much as they make
ADDED_AT = {"index_add_"}  # of their first tensor they read and write as much as they add, their last
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "equal"}
DTYPES = {torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64", torch.float8_e4m3fn: "FP8"}
KIND_OF_ATEN = {
    **dict.fromkeys(("mm", "addmm", "bmm", "_grouped_mm"), "gemm"),
    **dict.fromkeys(
        (
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention_backward",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_backward",
        ),
        "attention",
    ),
}


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in arguments, lists and descriptors of tiles among them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(base := getattr(values, "base", None), Tensor):
        yield base


def size_of(tensor: Tensor) -> int:
    """Bytes of the values that a tensor really has: a dimension of stride 0 counts once."""
    number = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= 1 if stride == 0 and length else length
    return number * tensor.element_size()


def results(op: str, made: Any) -> list[str]:
    """What an op returned, in words: dtype, shape, and of FP8 which way its tiles lie."""
    words = []
    values = made if isinstance(made, list | tuple) else [made]
    for number, value in enumerate(values):
        if isinstance(value, Fp8Tensor):
            turned = (number == len(values) - 1 and "columns" in op) or (op == "swiglu_backward" and number == 1)
            layout = "blocks" if value.tile == BLOCK_TILE else "columns" if turned else "rows"
            words.append(f"FP8 {layout} {list(value.shape)}")
        elif isinstance(value, E5m6Tensor):
            words.append(f"E5M6 {list(value.shape)}")
        elif isinstance(value, Tensor) and value.numel() > 1:
            words.append(f"{DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))} {list(value.shape)}")
    return words


def site() -> str:
    """The project's innermost line on the stack; in autograd's own functions the line that made their node."""
    frame = sys._getframe(1)
    while frame is not None:
        if (place := project_line(frame.f_code.co_filename, frame.f_lineno)) is not None:
            return place
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    if node is None:
        return "autograd"
    for line in reversed("".join(node.metadata.get("traceback_", ())).split('File "')):
        name, _, rest = line.partition('", line ')
        if (place := project_line(name, int(rest.split(",")[0]) if rest else 0)) is not None:
            return f"{place} ({node.name()})"
    return str(node.name())


def project_line(filename: str, line: int) -> str | None:
    """path:line of a file of the package, by the path it has in the repository."""
    if not filename.startswith(str(ROOT)):
        return None
    path = filename[len(str(ROOT)) + 1 :].removeprefix("fp8moe/" if "/fp8moe/kernels/" in filename else "")
    return f"{path}:{line}" if path.startswith(("fp8moe/", "kernels/")) else None


class Recorder(TorchDispatchMode):
    """See the module; phases may lie within phases."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._op: Call | None = None  # the project's op whose launcher runs
        self._live = 0
        self._phases = [("setup", 0)]  # by name, with the bytes that lived when it began; the innermost last
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def phase(self) -> str:
        """The innermost phase."""
        return self._phases[-1][0]

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Within the block launches belong to phase `name`, or to one within it; its most memory is measured."""
        self._phases.append((name, self._live))
        try:
            yield
        finally:
            self._phases.pop()

    @contextmanager
    def in_op(self, name: str, backend: str, kind: str) -> Iterator[Call]:
        """Within the block every launch belongs to the project's op `name`, whose results the caller adds."""
        assert self._op is None, "an op calls no other op"
        self._op = Call(self.phase, name, backend, kind, site())
        self.trace.calls.append(self._op)
        try:
            yield self._op
        finally:
            self._op = None

    def launched(self, kernel: str, size: int, *, count: int = 1, kind: str = "element-wise") -> None:
        call = self._op
        if call is None:
            call = Call(self.phase, kernel, "torch", kind, site())
            self.trace.calls.append(call)
        call.launches, call.bytes = call.launches + count, call.bytes + size
        self.trace.launches.append(Launch(self.phase, call.op, kernel, call.backend, call.kind, size, site(), count))

    def waited(self, what: str) -> None:
        self.trace.waits.append(Wait(self.phase, what, site()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        given = list(tensors_in([args, kwargs]))
        on_device = any(t.device.type == "cuda" for t in given)
        if on_device:
            self._watch_waits(name, func, args, kwargs)
        if name == "_local_scalar_dense":
            return 1.0 if given[0].is_floating_point() else 1
        if name == "bincount":
            out: Any = given[0].new_zeros(kwargs.get("minlength", args[2] if len(args) > 2 else 1), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        made = list(tensors_in([out]))
        for tensor in made:
            self._allocated(tensor)
        if on_device or any(t.device.type == "cuda" for t in made):
            if name in ("_to_copy", "copy_"):
                source, target = (given[0], made[0]) if name == "_to_copy" else (given[1], given[0])
                self._watch_copies(source, target, bool(kwargs.get("non_blocking", args[2:] and args[2])))
            if not (name in NO_LAUNCH or _is_view(func)):
                self._record(name, given, made)
        return out

    def _watch_waits(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or masks or unsized:
            self.waited(name)

    def _watch_copies(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if target.device.type == "cpu" and source.device.type == "cuda" and not non_blocking:
            self.waited("copy to the host")
        if source.device.type == "cpu" and target.device.type == "cuda":
            self.trace.copies.append(Wait(self.phase, "copy to the device", site()))
        if source.device.type == "cpu" and source.dim() and target.device.type == "cuda" and not non_blocking:
            self.waited("copy to the device")

    def _record(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        read = given[1:] if name in WRITE_ONLY | GATHERS | ADDED_AT else given
        moved = [*_distinct(read), *_distinct(made)]
        if name in GATHERS:
            moved += made
        elif name in ADDED_AT:
            moved = [*_distinct(read), given[-1], given[-1]]
        size = sum(map(size_of, moved))
        kind = KIND_OF_ATEN.get(name, "element-wise")
        self.launched(f"aten::{name}", size, count=SEVERAL.get(name, 1), kind=kind)
        if self._op is None:
            self.trace.calls[-1].results = results(name, made)

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._live += size
        weakref.finalize(storage, self._freed, size)
        for phase, began in self._phases:
            self.trace.peak[phase] = max(self.trace.peak.get(phase, 0), self._live - began)

    def _freed(self, size: int) -> None:
        self._live -= size


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _is_view(func: Any) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)
