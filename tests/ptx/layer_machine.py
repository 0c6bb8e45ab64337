"""A Hopper whose kernels the PTX machine runs: tensors lie on the CPU and say `cuda`, ops choose as on a GPU.

Every launch is noted with the phase and the op that it belongs to, and each op is called once more as the specification
has it, on copies of its operands made before: `compare` is given what both returned and what became of both operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from benchmarks.pretended_gpu import device_patches
from fp8moe.kernels import backend
from tests.ptx.launching import Machine, on_machine

SHARED_MEMORY = 232448  # bytes that a block may have
Compare = Callable[[str, str, Any, Any], None]  # place, op, what it gave and its operands, those of the specification


@dataclass
class Watch:
    """A listener of spans. launched: phase, op and kernel of each launch; undone: ops without a device back end."""

    phase: str = ""
    launched: list[tuple[str, str, str]] = field(default_factory=list)
    undone: set[str] = field(default_factory=set)

    def began(self, name: str) -> str:
        before, self.phase = self.phase, name
        return before

    def ended(self, name: str, began: str) -> None:
        self.phase = began


def copied(value: Any) -> Any:
    """An op's argument with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: copied(part) for name, part in vars(value).items()})
    return value


def wide_mm(mm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.mm` with FP32 sums of BF16 operands, which PyTorch has for GPUs alone."""

    def multiply(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), **options)

    return multiply


@contextmanager
def on_hopper(machine: Machine, watch: Watch, compare: Compare) -> Iterator[None]:
    """Within the block this process has that Hopper."""
    run = backend._run

    def run_op(name: str, *args: Any, **kwargs: Any) -> Any:
        operands, options = copied(args), {key: copied(value) for key, value in kwargs.items()}
        first = len(machine.launched)
        result = run(name, *args, **kwargs)
        if len(machine.launched) == first:
            watch.undone.add(name)
        watch.launched += [(watch.phase, name, kernel.name) for kernel, _ in machine.launched[first:]]
        expected = backend._load(backend.REFERENCE, name)(*operands, **options)
        compare(f"{watch.phase}: {name}", name, (result, args, kwargs), (expected, operands, options))
        return result

    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": SHARED_MEMORY})
    with ExitStack() as stack:
        for target, name, value in device_patches():
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(torch, "mm", wide_mm(torch.mm)))
        stack.enter_context(mock.patch.object(backend, "_run", run_op))
        stack.enter_context(mock.patch.object(driver.active, "utils", utils, create=True))
        backend.set_backend("gluon")
        stack.callback(backend.set_backend, None)
        stack.enter_context(on_machine(machine))
        yield
