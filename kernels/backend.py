"""The one place where the implementation of an op is chosen.

Every public op of this package validates its arguments and then calls `op(name)`. The choice is, in this order:
`set_backend(name)`, the environment variable FP8MOE_BACKEND, the default. It is logged once, and there is no silent
fall-back: a back end that is unknown or cannot run here is a `ValueError` that says why. An implementation lives in
`kernels/<back end>/<module>.py` under the same name and with the same signature as the public op.
"""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

REFERENCE = "reference"
BACKENDS = (REFERENCE,)
VARIABLE = "FP8MOE_BACKEND"

_MODULE_OF = {
    "quantize_rows": "quantize",
    "quantize_columns": "quantize",
    "quantize_rows_and_columns": "quantize",
    "quantize_blocks": "quantize",
    "requantize_columns": "quantize",
    "gemm": "gemm",
    "wgrad": "gemm",
    "grouped_gemm": "grouped_gemm",
    "grouped_wgrad": "grouped_wgrad",
    "grouped_mm": "grouped_mm",
    "grouped_mm_wgrad": "grouped_mm",
    "swiglu": "swiglu",
    "swiglu_columns": "swiglu",
    "swiglu_backward": "swiglu",
    "plan_rows": "permute",
    "permute": "permute",
    "unpermute": "permute",
    "group_limited_topk": "topk",
    "adamw_step": "adamw",
}
OPS = tuple(_MODULE_OF)

_log = logging.getLogger(__name__)
_chosen: str | None = None
_loaded: dict[str, Callable[..., Any]] = {}


def resolve() -> str:
    """The back end in force. Raises ValueError where FP8MOE_BACKEND names none."""
    global _chosen
    if _chosen is None:
        requested = os.environ.get(VARIABLE)
        _chosen = _checked(requested or REFERENCE)
        _log.info("kernels: back end %s (%s)", _chosen, VARIABLE if requested else "default")
    return _chosen


def set_backend(name: str | None) -> None:
    """Choose a back end for this process; None returns to the environment variable and the default."""
    global _chosen
    checked = None if name is None else _checked(name)
    _loaded.clear()
    _chosen = checked
    if checked is not None:
        _log.info("kernels: back end %s (set_backend)", checked)


def op(name: str) -> Callable[..., Any]:
    """The implementation of op `name` in the back end in force."""
    implementation = _loaded.get(name)
    if implementation is None:
        module = importlib.import_module(f".{resolve()}.{_MODULE_OF[name]}", __package__)
        implementation = _loaded[name] = getattr(module, name)
    return implementation


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"back end {name!r} does not exist in this version: use {' or '.join(BACKENDS)}")
    return name
