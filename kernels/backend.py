"""The one place where the implementation of an op is chosen.

Every public op of this package validates its arguments and then calls `op(name)`. The choice is, in this order:
`set_backend(name)`, the environment variable FP8MOE_BACKEND, the default: on a CPU the specification, on a GPU the
first of DEFAULTS that can run there. It is made when an op first runs and stands until `set_backend`. A back end that
is unknown or cannot run here is a `ValueError` that says why and which would. An implementation lives in
`kernels/<back end>/<module>.py` under the same name and with the same signature as the public op.

PROVIDES below says what each back end does: the specification and Triton everything, the others products. What a back
end lacks goes to the one that NEXT names, and the log line says so once. That table is the whole of the fall-back: an
op that its back end provides runs there or raises.

Tensors without data (meta, FakeTensor) and code under `torch.compile` go through the registered ops of `library`.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels import library

REFERENCE = "reference"
BACKENDS = (REFERENCE, "triton", "gluon", "cublas", "deepgemm", "te")
DEFAULTS = ("gluon", "triton")  # on a GPU, the first that can run
VARIABLE = "FP8MOE_BACKEND"

_OPS_OF = {
    "quantize": (
        "quantize_rows",
        "quantize_columns",
        "quantize_rows_and_columns",
        "quantize_blocks",
        "requantize_columns",
    ),
    "e5m6": ("pack_e5m6", "unpack_e5m6", "e5m6_to_columns"),
    "gemm": ("gemm", "wgrad"),
    "grouped_gemm": ("grouped_gemm", "grouped_wgrad"),
    "grouped_mm": ("grouped_mm", "grouped_mm_wgrad"),
    "norm": ("rms_norm", "rms_norm_columns", "rms_norm_backward"),
    "rope": ("rope_queries", "rope_queries_backward", "rope_keys", "rope_keys_backward"),
    "swiglu": ("swiglu", "swiglu_columns", "swiglu_backward"),
    "silu_mul": ("silu_mul", "silu_mul_backward"),
    "expert_bias": ("add_expert_bias", "expert_bias_dgrad", "expert_bias_wgrad"),
    "decode_attention": ("decode_attention",),
    "permute": ("plan_rows", "permute", "permute_quantize", "unpermute"),
    "message": ("plan_message", "pack_message", "unpack_message"),
    "cross_entropy": ("cross_entropy", "cross_entropy_with_gradient"),
    "embedding": ("embedding_wgrad",),
    "route": ("route", "route_backward"),
    "adamw": ("adamw_step", "adamw_step_quantize"),
    "squared_norm": ("squared_norm",),
}
_MODULE_OF = {op: module for module, ops in _OPS_OF.items() for op in ops}
OPS = tuple(_MODULE_OF)

PROVIDES: dict[str, frozenset[str]] = {
    REFERENCE: frozenset(OPS),
    "triton": frozenset(OPS),
    "gluon": frozenset({"gemm", "grouped_gemm", "grouped_wgrad", "wgrad", "grouped_mm_wgrad"}),
    "cublas": frozenset({"gemm"}),
    "deepgemm": frozenset({"gemm", "grouped_gemm"}),
    "te": frozenset({"gemm"}),
}
NEXT = {"triton": REFERENCE, "gluon": "triton", "cublas": "triton", "deepgemm": "triton", "te": "triton"}
_PACKAGE = {
    "triton": "triton",
    "gluon": "triton",
    "cublas": "triton",
    "deepgemm": "deep_gemm",
    "te": "transformer_engine",
}
_HOPPER_ONLY = ("gluon", "cublas", "deepgemm", "te")
# Oldest and newest release that these kernels were tried with (README, Versions). A compiler that nobody has looked at
# may drop a fence, or fuse a cast into two stores: it runs only where UNTRIED_VARIABLE asks for it.
_TRIED = {"torch": ((2, 11), (2, 14)), "Triton": ((3, 6), (3, 8))}
UNTRIED_VARIABLE = "FP8MOE_UNTRIED"
_OLDEST_TE = (2, 11)

_log = logging.getLogger(__name__)
_chosen: str | None = None  # explicitly, by set_backend or by the environment
_announced: set[tuple[str, str]] = set()
# What was chosen when an op first ran, until `set_backend`: what `op` returns, and what runs on each device.
_calls: dict[str, Callable[..., Any]] = {}
_selected: dict[tuple[str, torch.device], tuple[Callable[..., Any], int | None]] = {}
_WITH_DATA = (Tensor, torch.nn.Parameter)  # a meta tensor is of these types as well; other types are traced


def resolve(device: torch.device | None = None) -> str:
    """The back end in force for tensors on `device`; without one, where this machine computes: its GPU, else the CPU.

    Raises ValueError where FP8MOE_BACKEND names a back end that does not exist or cannot run here.
    """
    global _chosen
    if _chosen is None and (requested := os.environ.get(VARIABLE)):
        _chosen = _checked(requested)
        _announce(_chosen, VARIABLE)
    if _chosen is not None:
        return _chosen
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    name = _default(kind)
    _announce(name, "default")
    return name


def set_backend(name: str | None) -> None:
    """Choose a back end for this process; None returns to the environment variable and the default."""
    global _chosen
    checked = None if name is None else _checked(name)
    _announced.clear()
    _calls.clear()
    _selected.clear()
    _chosen = checked
    if checked is not None:
        _announce(checked, "set_backend")


def provider(name: str, backend: str) -> str:
    """Whose implementation of op `name` runs where `backend` is in force."""
    while name not in PROVIDES[backend]:
        backend = NEXT[backend]
    return backend


def op(name: str) -> Callable[..., Any]:
    """The implementation of op `name`, chosen by the choice in force and by where its first argument lies."""
    if torch.compiler.is_compiling():
        return _without_entering(name)
    return _calls.get(name) or _by_first_argument(name, provider(name, resolve()))


def why_not(name: str) -> str | None:
    """Why back end `name` cannot run on this machine; None where it can."""
    if name == REFERENCE:
        return None
    if importlib.util.find_spec(f".{name}", __package__) is None:
        return "this version has no adapter for it"
    if importlib.util.find_spec(_PACKAGE[name]) is None:
        return f"the package {_PACKAGE[name]} is not installed"
    if reason := _untried("torch", torch.__version__):
        return reason
    if name in ("triton", "gluon"):
        triton = importlib.import_module("triton")
        if reason := _untried("Triton", triton.__version__):
            return reason
        if name == "triton" and triton.knobs.runtime.interpret:
            return None
    if name == "te" and (reason := _too_old(_PACKAGE[name], importlib.metadata.version(_PACKAGE[name]), _OLDEST_TE)):
        return reason
    if not torch.cuda.is_available():
        on_cpu = ", or TRITON_INTERPRET=1 set before Python starts, which is slow" if name == "triton" else ""
        return f"it needs a GPU with FP8 tensor cores{on_cpu}, and there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if name in _HOPPER_ONLY and (major, minor) != (9, 0):
        return f"it is for Hopper, compute capability 9.0, and this GPU has {major}.{minor}"
    if (major, minor) < (8, 9):
        return f"FP8 tensor cores come with compute capability 8.9, and this GPU has {major}.{minor}"
    return None


def _untried(package: str, version: str) -> str | None:
    oldest, newest = _TRIED[package]
    if oldest <= release_of(version) <= newest or os.environ.get(UNTRIED_VARIABLE) == "1":
        return None
    tried = " to ".join(".".join(map(str, one)) for one in (oldest, newest))
    return f"it was tried with {package} {tried} and this is {version} (set {UNTRIED_VARIABLE}=1 to run it untried)"


def release_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (3, 8) of "3.8.0+git1"."""
    return tuple(map(int, version.split(".")[:2]))


def _too_old(package: str, version: str, oldest: tuple[int, int]) -> str | None:
    if release_of(version) >= oldest:
        return None
    return f"it needs {package} {'.'.join(map(str, oldest))} or newer, this is {version}"


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"back end {name!r} does not exist in this version: use {' or '.join(BACKENDS)}")
    reason = why_not(name)
    if reason is not None:
        runnable = [other for other in BACKENDS if why_not(other) is None]
        raise ValueError(f"back end {name!r} cannot run here: {reason}: use {' or '.join(runnable)}")
    return name


@functools.cache
def _default(kind: str) -> str:
    """The back end of a kind of device ("cpu", "cuda") when nobody chose."""
    if kind != "cuda":
        return REFERENCE
    return next((name for name in DEFAULTS if why_not(name) is None), REFERENCE)


def _announce(name: str, chosen_by: str) -> None:
    if (name, chosen_by) in _announced:
        return
    _announced.add((name, chosen_by))
    elsewhere: dict[str, list[str]] = {}
    for one in OPS:
        if (runs := provider(one, name)) != name:
            elsewhere.setdefault(runs, []).append(one)
    told = "".join(f"; by {runs}: {', '.join(names)}" for runs, names in elsewhere.items())
    _log.info("kernels: back end %s (%s)%s", name, chosen_by, told)


@functools.cache
def _load(backend: str, name: str) -> Callable[..., Any]:
    implementation: Callable[..., Any] = getattr(
        importlib.import_module(f".{backend}.{_MODULE_OF[name]}", __package__), name
    )
    return implementation


def _by_first_argument(name: str, usual: str) -> Callable[..., Any]:
    """Op `name` as a function that looks where its tensor lies; it is documented as back end `usual` has it."""
    call = functools.update_wrapper(functools.partial(_run, name), _load(usual, name))
    _calls[name] = call
    return call


def _run(name: str, *args: Any, **kwargs: Any) -> Any:
    first = args[0]
    tensor: Tensor = first if isinstance(first, Tensor) else first.data
    if type(tensor) not in _WITH_DATA:
        return _without_entering(name)(*args, **kwargs)
    implementation, gpu = _selected.get((name, tensor.device)) or _select(name, tensor.device)
    if gpu is None or gpu == torch.cuda.current_device():
        return implementation(*args, **kwargs)
    with torch.cuda.device(gpu):  # Triton launches on the current device
        return implementation(*args, **kwargs)


def _select(name: str, device: torch.device) -> tuple[Callable[..., Any], int | None]:
    """What runs op `name` on tensors that lie on `device`, and the GPU that must be the current one meanwhile."""
    if device.type == "meta":  # no data to compute with
        return _without_entering(name), None
    runs = provider(name, resolve(device))
    if runs != REFERENCE and device.type != "cuda" and not _interpreted():
        raise ValueError(f"back end {runs!r} runs on a GPU and this tensor is on {device}: move it, or use {REFERENCE}")
    found = _load(runs, name), device.index if device.type == "cuda" else None
    _selected[name, device] = found
    return found


def _without_entering(name: str) -> Callable[..., Any]:
    """Op `name` for tracing: as it is registered, or, where it is not, the specification, traced through."""
    return library.traced(name) if name in library.DECLARATIONS else _load(REFERENCE, name)


def _interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


# A GEMM that runs one program an SM would otherwise hold every SM until it ends, and a collective that starts meanwhile
# wait for it. DeepSeek-V3 leaves 20 of 132 (report, section 3.2.2). The limit belongs to the process.
_sm_limit: int | None = None


def limit_sms(count: int | None) -> None:
    """At most `count` SMs for the GEMMs launched from now on; None: all."""
    global _sm_limit
    if count is not None and count < 1:
        raise ValueError(f"limit_sms must be at least 1, got {count}: use None for all of them")
    _sm_limit = count


@contextmanager
def limited_sms(count: int | None) -> Iterator[None]:
    """The same for the GEMMs launched within the block; None leaves the limit as it is."""
    before = _sm_limit
    if count is not None:
        limit_sms(count)
    try:
        yield
    finally:
        limit_sms(before)


def sm_limit() -> int | None:
    """The limit in force; None: all."""
    return _sm_limit


def allowed_sms(count: int) -> int:
    """How many of a device's `count` SMs a GEMM may take now."""
    return count if _sm_limit is None else min(_sm_limit, count)


library.register(_run, by_specification=lambda device: provider("quantize_rows", resolve(device)) == REFERENCE)
