"""Makes this process believe that the device of `device.cpp` is an H100.

What PyTorch asks of a GPU is answered here, and an op of the project runs by its specification on the device's memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.layers import cuda_graph
from fp8moe.layers.attention import choice
from fp8moe.parallel.stream import tensors_of
from tests.fake_cuda.launching import mutated
from tests.host_gpu import graphs, nccl

HOPPER = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0, total_memory=80 * 1024**3
)

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {key: mapped(one, change) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: mapped(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def run_op(name: str, *args: Any, **kwargs: Any) -> Any:
    """Op `name` by its specification, on the memory of its arguments."""
    given = list(tensors_of([args, list(kwargs.values())]))
    devices = {one.device for one in given}
    if devices == {torch.device("cpu")}:
        return backend._load(backend.REFERENCE, name)(*args, **kwargs)
    assert devices == {torch.device("cuda", LOCAL_RANK)}, f"{name} was given tensors on {sorted(map(str, devices))}"
    written = {id(one) for one in mutated(name, args, kwargs)} | {id(one) for one in tensors_of(kwargs.get("out"))}
    originals: dict[int, Tensor] = {}

    def host(tensor: Tensor) -> Tensor:
        torch.ops.host_gpu.access(tensor, id(tensor) in written, f"fp8moe::{name}")
        alias: Tensor = torch.ops.host_gpu.host(tensor.detach())
        originals[id(alias)] = tensor
        return alias

    def device(tensor: Tensor) -> Tensor:
        if id(tensor) in originals:
            return originals[id(tensor)]
        made: Tensor = torch.ops.host_gpu.device(tensor)
        torch.ops.host_gpu.access(made, True, f"fp8moe::{name}")
        return made

    arguments = mapped([list(args), kwargs], host)
    with torch.no_grad():
        return mapped(backend._load(backend.REFERENCE, name)(*arguments[0], **arguments[1]), device)


def install() -> None:
    """Patch PyTorch and the back ends, for the rest of the process."""

    def stream(device: Any = None, priority: int = 0) -> torch.Stream:
        return torch.Stream(device="cuda")

    def event(enable_timing: bool = False, **_: Any) -> torch.Event:
        return torch.Event(device="cuda", enable_timing=enable_timing)

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: LOCAL_RANK,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: HOPPER,
        "get_device_name": lambda device=None: HOPPER.name,
        "get_device_capability": lambda device=None: (HOPPER.major, HOPPER.minor),
        "max_memory_allocated": lambda device=None: torch.ops.host_gpu.memory()[1],
        "memory_allocated": lambda device=None: torch.ops.host_gpu.memory()[0],
        "reset_peak_memory_stats": lambda device=None: torch.ops.host_gpu.reset_peak(),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "Stream": stream,
        "Event": event,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "stream": lambda one: nullcontext() if one is None else one,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "graph_pool_handle": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    nccl.install()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    backend._run = run_op
    backend.why_not = lambda name: None
    backend.set_backend(None)
    cuda_graph.CudaGraph = graphs.HostGpuGraph
    choice.machine_of = lambda device, heads: choice.Machine("cpu")  # a GPU's kernels of attention are not here
