"""Which kernel computes core attention, forward and backward: one table, asked once for a device and its heads.

`auto` takes the first kernel of its list that can run; a kernel that is named runs or is refused in one sentence when
the layer is built. The kernel is pinned in the forward, so PyTorch can't fall back to a slower one in silence; the
backward is that of the same kernel. Whether PyTorch's fused kernels take the heads (192 features of queries and keys
beside 128 of values in DeepSeek-V3) is asked of PyTorch itself, which knows its cuDNN and the GPU.

Documents and windows on a GPU: PyTorch's kernel of variable length and flash-attn 4 take documents by their lengths and
windows by their size, FlexAttention skips blocks of scores that hold nothing. PyTorch's fused kernels would read a mask
that grows with the square of the sequence, and are not asked. The first takes values as wide as keys only: DeepSeek's
heads go to flash-attn 4 where it is installed, else to FlexAttention. That was refused for plain causal heads: cuDNN is
faster there. Refused too: documents padded to the longest for cuDNN, several times the work at the lengths of web text.

Queries of a part of a sequence (`context`) meet more keys than they are: the same kernels take both lengths, aligned at
their ends.

On a CPU no kernel has variable length: one is called for each document (`documents.by_document`). Heads that PyTorch's
fused kernel doesn't take go by blocks of queries (`blocked`). FlexAttention has no backward there.

Sinks need the log-sum-exp of the scores and its gradient (`sinks`): FlexAttention's on a GPU; `blocked` has them
inside. flash-attn 4 takes sinks without a gradient, PyTorch's fused kernels none.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

AUTO = "auto"
SETTINGS = (AUTO, "sdpa", "cudnn", "varlen", "flex", "flash")  # of model.attention.backend
LABELS = {
    "cudnn": "cuDNN",
    "varlen": "PyTorch's kernel of variable length",
    "flash": "flash-attn 4",
    "flex": "FlexAttention",
    "efficient": "PyTorch's memory-efficient kernel",
    "blocked": "blocks of queries",
    "sdpa": "PyTorch's own choice",
}
# What auto tries, in this order: by kind of device, and whether scores are masked beyond causality.
ORDER = {
    ("cpu", False): ("blocked", "sdpa"),
    ("cpu", True): ("blocked", "sdpa"),
    ("cuda", False): ("cudnn", "flash", "efficient", "sdpa"),
    ("cuda", True): ("varlen", "flash", "flex"),
}
WITH_SINKS = {"cpu": ("blocked",), "cuda": ("flex",)}
DENSE = ("sdpa", "cudnn", "efficient")  # on a GPU: they know windows and documents as masks only
HOPPER = (9, 0)
WIDEST_VARLEN = 256


@dataclass(frozen=True)
class Heads:
    """Heads of attention: features of a query or key, and of a value; their dtype; whether documents are masked.

    group: query heads that share a head of keys and values. window: some layers' queries see so many tokens at most.
    sinks: a logit more in each softmax. parted: there are fewer queries than keys, those of a part of each sequence.
    """

    qk_dim: int
    v_dim: int
    dtype: torch.dtype
    masked: bool
    group: int = 1
    window: int | None = None
    sinks: bool = False
    parted: bool = False

    @property
    def banded(self) -> bool:
        """Whether scores are masked beyond the causality of equally many queries and keys."""
        return self.masked or self.parted or self.window is not None

    @property
    def without_bands(self) -> str:
        """The setting that more kernels could do with; empty where there is none."""
        return "parallel.cp=1" if self.parted else "data.document_mask=false" if self.masked else ""

    def __str__(self) -> str:
        mask = ("masked by documents" if self.masked else "causal") + (", of a part's queries" if self.parted else "")
        shared = "" if self.group == 1 else f", {self.group} queries a key"
        window = "" if self.window is None else f", windows of {self.window}"
        return f"{self.qk_dim}/{self.v_dim} heads{shared}, {mask}{window}{', with sinks' if self.sinks else ''}"


@dataclass(frozen=True)
class Machine:
    """What a device offers: PyTorch's fused kernels that take the heads in question, and installed packages."""

    kind: str  # "cpu" or "cuda"
    capability: tuple[int, int] = (0, 0)
    fused: frozenset[str] = frozenset()  # of "cudnn" and "efficient"
    flash_error: str | None = "it is not installed"  # why flash-attn 4 can't be imported
    triton: bool = False
    varlen: frozenset[str] = frozenset()  # of "plain" and "grouped": heads that its kernel of variable length takes


@dataclass(frozen=True)
class Choice:
    """A kernel by its name in `core.BACKENDS`; saves_output: its backward reads what `attend` returns, there."""

    kernel: str
    saves_output: bool


def why_not(kernel: str, heads: Heads, machine: Machine) -> str | None:
    """Why `kernel` can't run these heads there, as the middle of a sentence; None where it can."""
    if heads.sinks and kernel not in ("blocked", "flex"):
        return "it gives no gradient of sinks" if kernel == "flash" else "it takes no sinks"
    if machine.kind == "cuda" and kernel in DENSE and heads.banded:
        return "it would read a dense mask"
    if kernel == "sdpa":
        return None
    if kernel == "blocked":
        if machine.kind != "cpu":
            return "it is for a CPU"
        if heads.sinks:
            return None
        if heads.group > 1:
            return "it takes a key for every query head"
        return "PyTorch's fused kernel takes equal heads on a CPU" if heads.qk_dim == heads.v_dim else None
    if machine.kind != "cuda":
        return "it has no backward on a CPU" if kernel == "flex" else "it needs a GPU"
    if kernel == "varlen":
        return _why_not_varlen(heads, machine)
    if kernel == "flex":
        return None if machine.triton else "it needs Triton"
    if kernel == "flash":
        if machine.flash_error is not None:
            return f"flash-attn 4 and its CuTe kernels can't be imported ({machine.flash_error}; extra `flash-attn`)"
        if machine.capability < HOPPER:
            return "it needs compute capability {}.{}, this GPU has {}.{}".format(*HOPPER, *machine.capability)
        return None if heads.dtype is torch.bfloat16 else f"it takes BF16, not {heads.dtype}"
    return None if kernel in machine.fused else f"PyTorch's {kernel} kernel does not take {heads} in {heads.dtype} here"


def _why_not_varlen(heads: Heads, machine: Machine) -> str | None:
    if heads.qk_dim != heads.v_dim:
        return f"its values are as wide as its keys, and these are {heads.qk_dim} and {heads.v_dim}"
    if heads.qk_dim > WIDEST_VARLEN or heads.qk_dim % 8:
        return f"its heads have at most {WIDEST_VARLEN} features, a multiple of 8, and these {heads.qk_dim}"
    if heads.dtype is not torch.bfloat16:
        return f"it takes BF16, not {heads.dtype}"
    if ("grouped" if heads.group > 1 else "plain") in machine.varlen:
        return None
    return "this PyTorch's takes no grouped heads (2.12 and newer do)" if machine.varlen else "this PyTorch has none"


def choose(setting: str, heads: Heads, machine: Machine) -> str:
    """The kernel that `model.attention.backend=setting` means. Raises ValueError for one that can't run there."""
    if setting == AUTO:
        order = WITH_SINKS[machine.kind] if heads.sinks else ORDER[machine.kind, heads.banded]
        reasons = {kernel: why_not(kernel, heads, machine) for kernel in order}
        runs = next((kernel for kernel, reason in reasons.items() if reason is None), None)
        if runs is None:
            told = "; ".join(f"{LABELS[kernel]}: {reason}" for kernel, reason in reasons.items())
            other = f", or use {heads.without_bands}" if heads.without_bands else ""
            raise ValueError(
                f"model.attention.backend=auto finds no kernel for {heads} ({told}): install triton{other}"
            )
        return runs
    reason = why_not(setting, heads, machine)
    if reason is not None:
        nearest = choose(AUTO, heads, machine)
        other = f", or {heads.without_bands}" if heads.without_bands and machine.kind == "cuda" else ""
        raise ValueError(
            f"model.attention.backend={setting} cannot run {heads}: {reason}: use model.attention.backend="
            f"{nearest if nearest in SETTINGS else AUTO}{other}"
        )
    return setting


@functools.cache
def chosen(setting: str, heads: Heads, device: torch.device) -> Choice:
    """The kernel for these heads on `device`, said once in the log. Raises ValueError as `choose` does."""
    machine = machine_of(device, heads)
    kernel = choose(setting, heads, machine)
    where = " on a CPU" if machine.kind == "cpu" else ""
    logger.info("attention: %s%s for %s (model.attention.backend=%s)", LABELS[kernel], where, heads, setting)
    return Choice(kernel, machine.kind == "cuda" and kernel != "sdpa" and not heads.sinks)


def machine_of(device: torch.device, heads: Heads) -> Machine:
    """What `device` offers for these heads."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Machine("cpu")
    return Machine(
        "cuda",
        torch.cuda.get_device_capability(device),
        _fused(device, heads),
        _flash_error(),
        importlib.util.find_spec("triton") is not None,
        _varlen(),
    )


def _fused(device: torch.device, heads: Heads) -> frozenset[str]:
    """PyTorch's fused kernels that take such heads, forward and backward: it says by looking at small tensors."""

    def small(features: int, heads_a_key: int = 1) -> torch.Tensor:  # [1, heads, 128, features], laid out as inputs are
        made = torch.empty(1, 128, 2 * heads_a_key, features, dtype=heads.dtype, device=device, requires_grad=True)
        return made.transpose(1, 2)

    asked: dict[str, Callable[..., bool]] = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    q, k, v = small(heads.qk_dim, heads.group), small(heads.qk_dim), small(heads.v_dim)
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, heads.group > 1)
    return frozenset(name for name, can_use in asked.items() if can_use(params))


@functools.cache
def _varlen() -> frozenset[str]:
    """Heads that PyTorch's kernel of variable length takes; before 2.11 it knew neither a scale nor windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(known):
        return frozenset()
    return frozenset({"plain", "grouped"} if "enable_gqa" in known else {"plain"})


@functools.cache
def _flash_error() -> str | None:
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
