"""Versions of what a run is made of, and which kernel back ends would run and why the others would not."""

from __future__ import annotations

import importlib.metadata
import platform
import re

import torch

from fp8moe import __version__
from fp8moe.doctor.finding import Finding, Level
from fp8moe.kernels import backend

PART, KERNELS = "versions", "kernels"
OPTIONAL = (  # by distribution: the extra of this project that installs it, "" for those without one
    ("transformer-engine", "te"), ("deep_gemm", ""), ("deep_ep", ""), ("flash-attn-4", "flash-attn"),
    ("deepspeed", "deepspeed"), ("transformers", "hf"), ("tensorboard", "tensorboard"), ("wandb", "wandb"),
)  # fmt: skip


def versions() -> dict[str, str]:
    """Version of each part, "none" where it is absent. Nodes of one run should agree in all of them."""
    found = {"fp8moe": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = _version("triton") or "none"
    found["CUDA"] = torch.version.cuda or "none"
    found["NCCL"] = "none"
    if torch.version.cuda is not None:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {name: _version(name) or "none" for name, _ in OPTIONAL}


def check_versions(found: dict[str, str]) -> list[Finding]:
    """Lines on what is installed; a torch or Triton that was never tried is advice."""
    required = [f"{name} {found[name]}" for name in ("fp8moe", "Python", "torch", "triton", "CUDA", "NCCL")]
    optional = [f"{name} {found[name]}" for name, _ in OPTIONAL if found[name] != "none"]
    absent = [f"{name} (fp8moe[{extra}])" if extra else name for name, extra in OPTIONAL if found[name] == "none"]
    lines = [Finding(PART, ", ".join(required)), Finding(PART, f"optional: {', '.join(optional) or 'none'}")]
    if absent:
        lines.append(Finding(PART, f"not installed, not needed: {', '.join(absent)}"))
    return lines


def check_same(mine: dict[str, str], first: dict[str, str]) -> list[Finding]:
    """A finding for each version of this rank that differs from rank 0's (`first`)."""
    return [
        Finding(
            PART, f"{name} is {mine[name]}, and {first[name]} on rank 0", Level.STOP,
            f"install {name} {first[name]}, as on rank 0: ranks of one run need equal versions",
        )
        for name in first if mine[name] != first[name]
    ]  # fmt: skip


def check_kernels() -> list[Finding]:
    """Which back end would run the ops here, and why each other one would not."""
    try:
        chosen = backend.resolve()
    except ValueError as error:
        fix = f"unset {backend.VARIABLE}, or name a back end that runs here"
        return [Finding(KERNELS, str(error), Level.STOP, fix)]
    by: dict[str, list[str]] = {}
    for op in backend.OPS:
        by.setdefault(backend.provider(op, chosen), []).append(op)
    shares = "; ".join(f"{name}: {_some(ops)}" for name, ops in by.items())
    lines = [Finding(KERNELS, f"back end {chosen} would run: {shares}")]
    for name in backend.BACKENDS:
        reason = backend.why_not(name)
        if name == chosen:
            continue
        if reason is None:
            lines.append(Finding(KERNELS, f"{name} could run ({backend.VARIABLE}={name})"))
        else:
            lines.append(_refused(name, reason))
    return lines


def _refused(name: str, reason: str) -> Finding:
    text = f"{name} would not run: {reason}"
    if "was tried with" in reason and torch.cuda.is_available():
        tried = re.search(r"with (\S+ \S+ to \S+)", reason)
        wanted = tried[1] if tried else "a version that was tried"
        return Finding(KERNELS, text, Level.ADVICE, f"install {wanted}, or set {backend.UNTRIED_VARIABLE}=1")
    return Finding(KERNELS, text)


def _some(ops: list[str]) -> str:
    return f"all {len(ops)} ops" if len(ops) == len(backend.OPS) else f"{len(ops)} ops ({', '.join(ops[:3])}, ...)"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
