"""Builds and loads libraries that must come before PyTorch.

Without `guard.cpp` autograd refuses tensors on `cuda` where PyTorch was built without CUDA.

Nothing here imports torch: the library must be loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """A C++ compiler: $CXX, or the first that is installed."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))), None)


def why_not() -> str | None:
    """Why the guard can't be built on this machine; None where it can."""
    if not sys.platform.startswith("linux"):
        return f"one library's symbols must come before another's, as on Linux; this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "the launches of Triton kernels are counted, and Triton is not installed"
    if any((_torch() / "lib").glob("libtorch_cuda*")):
        return "this build of PyTorch has CUDA: what a GPU does is measured on one"
    if compiler() is None:
        return "no C++ compiler: install g++ or set CXX"
    return None


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def build(folder: Path, source: Path = SOURCE, *included: Path) -> Path:
    """The library of `source` in `folder`, built once for it, the files that it includes and this PyTorch."""
    torch, cxx = _torch(), compiler()
    assert cxx is not None
    version = importlib.metadata.version("torch")
    texts = "".join(one.read_text() for one in (source, *included))
    key = hashlib.sha256(f"{texts} {version} {torch} {cxx}".encode()).hexdigest()[:16]
    library = folder / f"{source.stem}_{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        include, lib = torch / "include", torch / "lib"
        command = [
            *(cxx, "-O1", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(partial)),
            *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
            *(f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"),
        ]
        subprocess.run(command, check=True, timeout=300)
        partial.rename(library)  # another process may build it at the same time
    return library


def load(library: Path) -> None:
    """Load the guard; torch must not be imported yet."""
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
