"""What decides a kernel's speed and needs no clock, for every kernel on an aligned problem: the rows of `counts.json`.

    python -m tests.ptx --write     rewrite this Triton version's part of counts.json
    python -m tests.ptx --write --missing    run and add only what that part lacks

    per            what instructions are counted against: "wgmma" (one, of a warp) or "byte" (of global memory, loaded
                   or stored by ordinary accesses)
    instructions   of a warp for each WGMMA, or of a thread for each byte
    loads, stores  useful bytes over bytes of the sectors moved, access by access, of global memory
    banks          wavefronts of shared memory over the least there could be
    barriers       barriers and waits that a warp passes for each group of products that it starts

What TMA moves is not counted, it moves whole lines. `speed_limits` has the bounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ptx.counts import Counts
from tests.ptx.launching import Kernel

TABLE = Path(__file__).with_name("counts.json")
WAITS = ("bar.sync", "barrier.sync", "mbarrier.try_wait")


def times(kernel: Kernel, counts: Counts, *openings: str) -> int:
    """How often a warp executed an instruction whose opcode begins so."""
    code = kernel.decoded.program.code
    return sum(n for one, n in zip(code, counts.executed, strict=True) if one.opcode.startswith(openings))


def ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 3) if whole else None


def figures(kernel: Kernel, launches: list[Counts]) -> dict[str, Any]:
    """One kernel's row, of all its launches in a case."""
    total = Counts(executed=[sum(n) for n in zip(*(one.executed for one in launches), strict=True)])
    for one in launches:
        total.wavefronts, total.least = total.wavefronts + one.wavefronts, total.least + one.least
        for name in ("ld", "st"):
            total.useful[name] += one.useful[name]
            total.moved[name] += one.moved[name]
    products, groups = times(kernel, total, "wgmma.mma_async"), times(kernel, total, "wgmma.commit_group")
    executed = times(kernel, total, "")
    moved = total.useful["ld"] + total.useful["st"]
    row = {"per": "wgmma", "instructions": ratio(executed, products)}
    if not products:
        row = {"per": "byte", "instructions": ratio(32 * executed, moved)}
    row |= {
        "loads": ratio(total.useful["ld"], total.moved["ld"]),
        "stores": ratio(total.useful["st"], total.moved["st"]),
        "banks": ratio(total.wavefronts, total.least),
        "barriers": ratio(times(kernel, total, *WAITS), groups),
    }
    return {name: value for name, value in row.items() if value is not None}


def rows(name: str, launched: list[tuple[Kernel, Counts]]) -> dict[str, dict[str, Any]]:
    """Kernel of the compile table -> its row, for the launches of one case."""
    by_kernel: dict[int, tuple[Kernel, list[Counts]]] = {}
    for kernel, counts in launched:
        by_kernel.setdefault(id(kernel), (kernel, []))[1].append(counts)
    return {f"{name} {kernel.name}": figures(kernel, counts) for kernel, counts in by_kernel.values()}


def recorded(version: str, path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The rows under this Triton version, by kernel."""
    return json.loads(path.read_text()).get(version, {}) if path.exists() else {}


def write(version: str, table: dict[str, dict[str, Any]], path: Path = TABLE) -> None:
    """Put the rows under this Triton version, a kernel a line."""
    versions = json.loads(path.read_text()) if path.exists() else {}
    versions[version] = dict(sorted(table.items()))
    parts = []
    for one in sorted(versions):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in versions[one].items())
        parts.append(f" {json.dumps(one)}: {{\n{lines}\n }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
