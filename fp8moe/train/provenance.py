"""What made a checkpoint: versions of what computes, and the commit of this code where it is a git checkout."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import fp8moe

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of PACKAGES that are installed."""
    found = {"python": platform.python_version(), "fp8moe": fp8moe.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of the checkout this package runs from; None outside one, or without git."""
    folder = Path(fp8moe.__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
