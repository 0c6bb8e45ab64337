"""Every kernel as Hopper machine code, on a machine without a GPU: what `test_sm90` checks and `sm90.json` records.

    python -m tests.kernels.sm90            compile everything, print the table
    python -m tests.kernels.sm90 --write    and rewrite this Triton version's part of sm90.json
    python -m tests.kernels.sm90 --write --missing    compile and add only what that part lacks

The launchers themselves are run, on CPU tensors that nobody reads, with the launch replaced by a note of what would
have been compiled: the signature, alignment and constants are those of a real run, and a launcher that doesn't fit its
kernel fails here. Notes are then compiled for sm_90a in two processes (`ptx_cache`: kernels that `tests.ptx` has
compiled are not compiled again) and their SASS is counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from tests.kernels import ptx_cache
from tests.kernels.reductions import sums_added_again
from tests.kernels.sass import disassembled, e4m3_casts, loads_in_flight, spills_in_steps, texts
from tests.kernels.sm90_cases import cases

TABLE = Path(__file__).with_name("sm90.json")
COUNTED = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "FFMA", "FMUL", "LDG", "STG", "STL", "LDL")
PROCESSES = 2
SYNCED = ("bar.sync", "bar.warp.sync")  # the warps of a consumer, the one warp of a producer
# What older compilers keep in local memory where Triton 3.8 needs none: (words stored or loaded, bytes). 8 bytes that
# no instruction touches are a frame and cost nothing; the words are of kernels at 128 registers, of clamped rows.
_LEFT = {
    "triton add_expert_bias fp32 bias_add_kernel": (0, 8),
    "triton expert_bias_dgrad fp32 bias_dgrad_kernel": (0, 8),
    "triton swiglu_backward clamped bf16 F320 swiglu_backward_kernel": (4, 16),
}
IN_LOCAL_MEMORY = {
    "3.6.0": _LEFT | {"triton swiglu_backward clamped bf16 pow2 swiglu_backward_kernel": (1, 8)},
    "3.7.1": _LEFT,
}


@dataclass(frozen=True)
class Note:
    """One kernel that a launcher asked for."""

    name: str
    kernel: str
    source: Any
    options: dict[str, Any]


@contextmanager
def noting(label: str, notes: dict[str, Note]) -> Iterator[None]:
    """Launches inside are noted under `label` and do not run."""
    launched = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        _, _, _, backend, binder = self.device_caches[0]
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = self.ASTSource(self, signature, constants, attributes)
        name = f"{label} {self.__name__}"
        notes.setdefault(name, Note(name, f"{self.__module__}.{self.__name__}", source, options.__dict__))

    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = launched


def collect() -> dict[str, Note]:
    """Every kernel that the cases launch, by name."""
    notes: dict[str, Note] = {}
    for label, launch in cases():
        with noting(label, notes):
            launch()
    return notes


def figures(compiled: Any, sass: str, usage: str) -> dict[str, int]:
    """Counts of instructions in the SASS, shared memory in bytes, registers and local memory a thread, threads."""
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED}
    if "MULTICAST" in sass:
        counts["multicast"] = len(re.findall(r"\bUTMALDG\S*\.MULTICAST", sass))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return counts | {
        "shared": compiled.metadata.shared,
        "registers": int(found["REG"]),
        "local": int(found["STACK"]) + int(found["LOCAL"]),
        "threads": 32 * compiled.metadata.num_warps,
    }


def fits_registers(version: str, name: str, figure: dict[str, int]) -> bool:
    """Does a kernel use no local memory, but what this Triton is known to?"""
    words, size = IN_LOCAL_MEMORY.get(version, {}).get(name, (0, 0))
    return max(figure["STL"], figure["LDL"]) <= words and figure["local"] <= size


def wide(sass: str) -> dict[str, int]:
    """How many accesses to global memory are of 16 bytes, and how many are atomic."""
    forms = {"loads": r"LDG\.E\S*\.128\b", "stores": r"STG\.E\S*\.128\b", "atomic": r"(?:ATOM|ATOMG|RED)\."}
    return {name: len(re.findall(rf"\b{form}", sass)) for name, form in forms.items()}


def unguarded_arrivals(ptx: str) -> int:
    """Arrivals at a barrier that no barrier of the partition's warps precedes directly.

    One thread arrives for four warps: without it a slot could be refilled under a warp that still reads it.
    """
    lines = [line.strip() for line in ptx.splitlines() if line.strip() and not line.strip().startswith(("//", "."))]
    wrong = 0
    for i, line in enumerate(lines):
        if "mbarrier.arrive.shared" not in line:
            continue
        before = lines[max(0, i - 12) : i]
        synced = max((j for j, text in enumerate(before) if text.startswith(SYNCED)), default=None)
        touched = ("wgmma", "ld.shared", "ldmatrix", "$L", "@%p")
        between = [] if synced is None else before[synced + 1 :]
        wrong += synced is None or any(text.startswith(touched) and "bra" not in text for text in between)
    return wrong


def compile_share(notes: list[Note]) -> dict[str, dict[str, Any]]:
    """What is found of each kernel, by name."""
    compiled = [triton.compile(note.source, target=ptx_cache.TARGET, options=note.options) for note in notes]
    codes = [ptx_cache.machine_code(one, note.options) for note, one in zip(notes, compiled, strict=True)]
    return {
        note.name: reading(note, one, *code)
        for note, one, code in zip(notes, compiled, disassembled(codes), strict=True)
    }


def reading(note: Note, compiled: Any, sass: str, usage: str) -> dict[str, Any]:
    """What the tests want to know of one kernel."""
    code = texts(sass)
    return {
        "kernel": note.kernel,
        "figures": figures(compiled, code, usage),
        "wide": wide(code),
        "unguarded": unguarded_arrivals(compiled.asm["ptx"]) if ".gluon." in note.kernel else 0,
        "in_flight": loads_in_flight(sass) if ".gluon." in note.kernel else 0,
        "spills_in_steps": spills_in_steps(sass),
        "casts": e4m3_casts(code),
        "added_again": sums_added_again(note.name, compiled.asm),
        "asked_for": compiled.asm["ptx"].count("prefetch.global.L2"),
        "remote": compiled.asm["ptx"].count("mbarrier.arrive.shared::cluster"),
    }


NOTES: list[Note] = []  # of this process, whose children compile a share each: a note can't be sent to another process


def _numbered(share: int) -> dict[str, dict[str, Any]]:
    return compile_share(NOTES[share::PROCESSES])


def compile_all(known: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """Name -> kernel, figures and what else `reading` reports, of every kernel not in `known`."""
    torch.set_num_threads(1)
    ptx_cache.prepare()
    NOTES[:] = [note for name, note in collect().items() if name not in known]
    merged: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:  # modules are loaded once
        for share in pool.map(_numbered, range(PROCESSES)):
            merged |= share
    return dict(sorted(merged.items()))


def recorded(path: Path = TABLE) -> dict[str, Any]:
    """The figures under this Triton version, by kernel."""
    return json.loads(path.read_text()).get(triton.__version__, {}) if path.exists() else {}


def write(result: dict[str, dict[str, Any]], path: Path = TABLE, *, beside: dict[str, Any] | None = None) -> None:
    """Put the figures, with those of `beside`, under this Triton version, a kernel a line."""
    table = json.loads(path.read_text()) if path.exists() else {}
    figures = (beside or {}) | {name: entry["figures"] for name, entry in result.items()}
    table[triton.__version__] = dict(sorted(figures.items()))
    versions = []
    for version in sorted(table):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table[version].items())
        versions.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for sm_90a and count its machine code")
    parser.add_argument("--write", action="store_true", help="rewrite this Triton version's part of sm90.json")
    parser.add_argument("--missing", action="store_true", help="only kernels that sm90.json lacks for this Triton")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    arguments = parser.parse_args()
    kept = recorded() if arguments.missing else {}
    result = compile_all(frozenset(kept))
    for name, entry in result.items():
        print(f"{name}: " + " ".join(f"{key} {value}" for key, value in entry["figures"].items() if value))
    if arguments.write:
        write(result, beside=kept)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
