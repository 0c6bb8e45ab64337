"""The project's ops on fake `cuda` tensors run their real launchers, as on a Hopper; only the kernels are left out.

An eager call on real tensors goes from the op to the back end's launcher, and a fake tensor's would go to the op's
registration. Here it goes to the launcher as well: what it allocates, fills and copies, and how often and on what it
launches, is what a GPU would see, and no table of launches has to be kept true. Fake tensors get addresses, since
launchers ask for alignment, and autograd's saved tensors are known by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.runtime.jit import JITFunction

from fp8moe.kernels import backend, library
from fp8moe.layers import operand
from tests.fake_cuda.recorder import Recorder, results, size_of, tensors_in

SHARED_MEMORY = 232448  # bytes that a block may have
HOPPER = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0)
DRIVER = SimpleNamespace(
    get_current_device=lambda: 0,
    utils=SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": SHARED_MEMORY}),
)
ALIGNMENT = 256  # of what the caching allocator returns is 512
KIND_OF_MODULE = {
    **dict.fromkeys(("quantize", "e5m6", "permute", "message"), "cast and permute"),
    **dict.fromkeys(("gemm", "grouped_gemm", "grouped_mm"), "gemm"),
    **dict.fromkeys(("swiglu", "silu_mul", "expert_bias"), "swiglu"),
    **dict.fromkeys(("norm", "rope"), "norm and rotation"),
    "route": "router",
    "cross_entropy": "loss",
    "adamw": "optimizer",
}
# Positions of what an op both reads and writes, where its declaration names results that it only writes as well.
MUTATED = {"adamw_step": (0, 2, 3), "adamw_step_quantize": (0, 2, 3)}


def storage_address(storage: Any) -> int:
    """An address for a storage without data; storages that live at one time have different ones."""
    return int(storage._cdata) * ALIGNMENT


def address(tensor: Tensor) -> int:
    return storage_address(tensor.untyped_storage()) + tensor.storage_offset() * tensor.element_size()


def kind_of(name: str) -> str:
    module = backend._MODULE_OF[name]
    return KIND_OF_MODULE.get(module, module)


def mutated(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op both reads and writes."""
    if name == "gemm":
        return list(tensors_in([kwargs.get("accumulate")]))
    places = MUTATED.get(name)
    if places is None and name in library.DECLARATIONS:
        places = tuple(i for i, kind in enumerate(library.DECLARATIONS[name].kinds) if kind == "Total")
    return list(tensors_in([args[i] for i in places or () if i < len(args)]))


def share_of(args: tuple[Any, ...]) -> float:
    """Which share of its tensors an op works on: what `Segments` say of flat buffers, otherwise all."""
    for one in args:
        if (spans := getattr(one, "spans", None)) is not None:
            return float(sum(stop - start for start, stop, _ in spans) / args[0].numel())
    return 1.0


def one_nan_a_dtype() -> Callable[[Tensor], Tensor]:
    """In place of `operand._nan`, which shares the NaN of real tensors; one trace's can't be shared with another."""
    nans: dict[torch.dtype, Tensor] = {}

    def nan(like: Tensor) -> Tensor:
        if like.dtype not in nans:
            nans[like.dtype] = like.new_full((), math.nan)
        return nans[like.dtype]

    return nan


@contextmanager
def on_fake_hopper(recorder: Recorder) -> Iterator[None]:
    """Within the block tensors are fake, `cuda` is a Hopper, and `recorder` hears of every launch."""

    def run_op(name: str, *args: Any, **kwargs: Any) -> Any:
        provider = backend.provider(name, backend.resolve())
        with recorder.in_op(name, provider, kind_of(name)) as call:
            if provider == backend.REFERENCE:  # a step should have none: it is reported, not followed through its loops
                assert name in library.DECLARATIONS, f"{name} has no device back end, and is not registered either"
                recorder.launched(name, 0)
                return library.traced(name)(*args, **kwargs)
            changed[:] = [t.untyped_storage() for t in mutated(name, args, kwargs)]
            share[0] = share_of(args)
            out = backend._load(provider, name)(*args, **kwargs)
            call.results = results(name, out)
            return out

    changed: list[Any] = []
    share = [1.0]

    def run_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {address(t): t for t in tensors_in([args, kwargs])}.values()
        again = sum(size_of(t) for t in given if any(t.untyped_storage() is s for s in changed))
        recorder.launched(self.__name__, int(share[0] * (sum(map(size_of, given)) + again)))

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """cuDNN's, which Hopper takes; PyTorch's choice among kernels is compiled for a GPU alone."""
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, options.get("attn_mask"), True, 0.0, bool(options.get("is_causal")), False,
            scale=options.get("scale"),
        )[0]  # fmt: skip
        return out

    patches: list[tuple[Any, str, Any]] = [
        (FakeTensor, "data_ptr", address),
        (torch.UntypedStorage, "data_ptr", storage_address),
        (JITFunction, "run", run_kernel),
        (backend, "_run", run_op),
        (operand, "_nan", one_nan_a_dtype()),
        (backend, "why_not", lambda name: None),
        (triton.runtime.driver, "_active", DRIVER),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_of", lambda tensor: nullcontext()),
        (torch.cuda, "get_device_properties", lambda device=None: HOPPER),
        (torch.cuda, "get_device_name", lambda device=None: HOPPER.name),
        (torch.cuda, "get_device_capability", lambda device=None: (HOPPER.major, HOPPER.minor)),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
    ]
    with ExitStack() as stack:
        for target, name, replacement in patches:
            stack.enter_context(mock.patch.object(target, name, replacement))
        backend.set_backend("gluon")
        stack.callback(backend.set_backend, None)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))  # nodes know who made them
        stack.enter_context(recorder)
        yield
