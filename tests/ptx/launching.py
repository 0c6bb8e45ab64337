"""Kernels launched by the project's own launchers, on CPU tensors: compiled for sm_90a, then run by this machine.

Inside `on_machine` a launch goes the way it goes on a GPU as far as the driver: Triton's binder gives the signature,
the alignments and the constants, and the kernel is compiled for `GPUTarget("cuda", 90, 32)`. Then, in place of the
driver: tensors' storages are laid out in the machine's memory, descriptors become tensor maps as the compiler's
metadata asks for, the CTAs run, and what they wrote is copied back.

A kernel's parameters are its arguments that are no constants, in order. A descriptor is 128 bytes, its sizes (32 bit)
and its strides (64 bit); what Triton appends (scratch memory) is null. ptxas is not called: this machine reads PTX.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction

from fp8moe.kernels.triton.launch import forget
from tests.kernels.ptx_cache import TARGET
from tests.ptx.counts import Counts
from tests.ptx.cta import Cta, Meeting
from tests.ptx.decode import Decoded, decode
from tests.ptx.memory import Global
from tests.ptx.order import Clocks
from tests.ptx.parser import parse
from tests.ptx.registers import LANES
from tests.ptx.scheduler import run_cluster
from tests.ptx.tma import TensorMap

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass
class Kernel:
    """A compiled kernel; `text` is its PTX."""

    name: str
    text: str
    shared: int
    descriptors: list[dict[str, Any]]
    decoded: Decoded


@dataclass
class Machine:
    """What launches share: compiled kernels, the schedule's seed, an edit of the PTX, sums' bits, what was counted."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    seed: int | None = None
    edit: Callable[[str], str] | None = None  # applied to the PTX before it runs
    count: bool = False
    fraction_bits: int | None = None  # of an FP8 product's sums in the tensor core; None: those of FP32
    launched: list[tuple[Kernel, Counts]] = field(default_factory=list)
    decoded: dict[str, Decoded] = field(default_factory=dict)  # by text; an edited kernel's last text only

    def program(self, kernel: Kernel) -> Decoded:
        """What a launch runs: the kernel, or its edited text."""
        if self.edit is None:
            return kernel.decoded
        text = self.edit(kernel.text)
        if text not in self.decoded:
            self.decoded = {text: decode(parse(text))}
        return self.decoded[text]


def storage(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor's storage, shared with it."""
    kept = tensor.untyped_storage()
    return np.frombuffer((ctypes.c_uint8 * kept.nbytes()).from_address(kept.data_ptr()), np.uint8)


def compile_kernel(machine: Machine, function: Any, bound: Any, pieces: tuple[Any, ...]) -> Kernel:
    options, signature, constants, attributes = pieces
    key = f"{function.__module__}.{function.__name__} {signature} {constants} {attributes} {options}"
    if key not in machine.kernels:
        source = function.ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
        text, metadata = compiled.asm["ptx"], compiled.metadata
        descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        machine.kernels[key] = Kernel(function.__name__, text, metadata.shared, descriptors, decode(parse(text)))
    return machine.kernels[key]


class Arguments:
    """Values in the order of the kernel's parameters, with tensors placed in the machine's memory."""

    def __init__(self, memory: Global, kernel: Kernel) -> None:
        self.memory, self.parameters = memory, kernel.decoded.program.parameters
        self.descriptors = iter(kernel.descriptors)
        self.placed: dict[int, int] = {}
        self.values: dict[str, bytes] = {}
        self.maps: dict[int, TensorMap] = {}
        self.next = 0

    def address(self, tensor: torch.Tensor) -> int:
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.untyped_storage().nbytes() == 0:
            return 0
        if pointer not in self.placed:
            self.placed[pointer] = self.memory.place(storage(tensor))
        return self.placed[pointer] + tensor.storage_offset() * tensor.element_size()

    def put(self, value: Any) -> None:
        """The next parameter."""
        parameter = self.parameters[self.next]
        self.next += 1
        if isinstance(value, float):
            raw = struct.pack("<f", value)
        else:
            raw = (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        self.values[parameter.name] = raw

    def add(self, value: Any) -> None:
        """An argument of the kernel: a tensor, a number, or a descriptor and what goes with it."""
        if isinstance(value, torch.Tensor):
            self.put(self.address(value))
        elif hasattr(value, "block_shape"):
            meta, size = next(self.descriptors), value.base.element_size()
            strides = tuple(int(s) * size for s in value.strides)
            box = tuple(int(b) for b in meta["block_size"])
            self.maps[self.next] = TensorMap(
                self.address(value.base), tuple(map(int, value.shape)), strides, box, size, SWIZZLES[meta["swizzle"]]
            )
            self.next += 1
            for number in (*value.shape, *value.strides):
                self.put(number)
        else:
            self.put(value)

    def finish(self) -> None:
        while self.next < len(self.parameters):
            self.put(0)


def execute(machine: Machine, kernel: Kernel, grid: tuple[int, ...], arguments: list[Any]) -> None:
    """Run every CTA of the grid, cluster by cluster, in order."""
    decoded, memory = machine.program(kernel), Global()
    program = decoded.program
    placed = Arguments(memory, kernel)
    for value in arguments:
        placed.add(value)
    placed.finish()
    memory.seal()
    counts = Counts(machine.count, [0] * len(program.code))
    width, height, depth = (*grid, 1, 1, 1)[:3]
    size = (width * program.cluster, height, depth)
    warps = -(-program.threads // LANES)
    choices = None if machine.seed is None else random.Random(machine.seed)
    with np.errstate(all="ignore"):
        for z in range(depth):
            for y in range(height):
                for x in range(width):
                    clocks = Clocks(warps * program.cluster)
                    ctas = [
                        Cta(
                            decoded, placed.values, placed.maps, memory, kernel.shared,
                            (x * program.cluster + rank, y, z), size, clocks, choices, counts,
                        )
                        for rank in range(program.cluster)
                    ]  # fmt: skip
                    meeting = Meeting(ctas)
                    for cta in ctas:
                        cta.peers, cta.meeting, cta.fraction_bits = ctas, meeting, machine.fraction_bits
                    run_cluster(ctas, choices)
    memory.bring_back()
    counts.settle(decoded.runs)
    machine.launched.append((kernel, counts))


@contextmanager
def on_machine(machine: Machine) -> Iterator[Machine]:
    """Launches inside run on the machine, prepared anew: cases change constants that launches follow from."""
    launched = JITFunction.run
    forget()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        _, _, _, backend, binder = self.device_caches[0]
        bound, specialization, options = binder(*args, **kwargs)
        pieces = self._pack_args(backend, kwargs, bound, specialization, options)
        kernel = compile_kernel(machine, self, bound, pieces)
        _, signature, constants, _ = pieces
        values = [
            value for i, (name, value) in enumerate(bound.items())
            if signature[name] != "constexpr" and (i,) not in constants
        ]  # fmt: skip
        execute(machine, kernel, tuple(grid(bound) if callable(grid) else grid), values)

    JITFunction.run = run
    try:
        yield machine
    finally:
        JITFunction.run = launched
        forget()
