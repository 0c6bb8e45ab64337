"""Runs the cases in processes of its own, two at once, and writes what became of each as JSON.

    python -m tests.ptx [--only TEXT] [--json FILE]

Triton reads TRITON_INTERPRET when it is imported, and the tests' process has it set: `test_ptx` starts this module once
for all its tests, and `sharing` gives its work to two processes. Another installed Triton is tried by the same command
with PYTHONPATH in front of it. What is compiled is kept, for the compile gate as well: `tests.kernels.ptx_cache`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

from tests.kernels import ptx_cache
from tests.ptx import (
    activation_cases,
    bias_cases,
    decode_cases,
    layer_cases,
    loss_cases,
    moving_cases,
    norm_cases,
    product_cases,
    route_cases,
    sharing,
    speed,
    sum_cases,
    token_cases,
    update_cases,
)
from tests.ptx.launching import Machine
from tests.ptx.layer_step import RECIPES
from tests.ptx.loops import loops
from tests.ptx.planting import PLANTED, run_plant, unclean


def prepare() -> None:
    """A compiler without a GPU and without ptxas, one thread, and memory full of NaN."""
    ptx_cache.prepare()
    torch.set_num_threads(1)
    # Fills what torch.empty returns. As torch.use_deterministic_algorithms(True), which imports a compiler first.
    torch.set_deterministic_debug_mode("error")
    gc.disable()  # a program is thousands of functions: Python would look through all of them again and again
    sweep()


def sweep() -> None:
    """Free what launches left in cycles; what is still there is a program or a module, and stays."""
    gc.collect()
    gc.freeze()


CASES = (
    moving_cases, activation_cases, bias_cases, norm_cases, route_cases, decode_cases, product_cases, token_cases,
    loss_cases, update_cases,
)  # fmt: skip


def all_cases() -> dict[str, Any]:
    return {name: case for module in CASES for name, case in module.cases()}


def run_case(name: str, run: Any, machine: Machine) -> dict[str, Any]:
    """What became of one case: its error if it failed, the kernels it ran and the opcodes they executed, its counts."""
    torch.manual_seed(zlib.crc32(name.encode()))
    machine.launched, machine.seed, machine.edit, machine.count = [], None, None, True
    start, error, rows = time.process_time(), "", {}
    try:
        run(machine)
        rows = speed.rows(name, machine.launched)
        machine.launched, machine.count = [], False
        run(machine)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    sweep()
    kernels, opcodes = set(), set()
    rounds: dict[str, int] = {}
    for kernel, counts in machine.launched:
        kernels.add(f"{name} {kernel.name}")
        for place, times in loops(kernel.decoded.program, counts).items():
            rounds[f"{kernel.name} {place}"] = rounds.get(f"{kernel.name} {place}", 0) + times
        opcodes |= {
            one.opcode for one, times in zip(kernel.decoded.program.code, counts.executed, strict=False) if times
        }
    seconds = round(time.process_time() - start, 2)  # of this process, however busy the machine is
    return {
        "error": error, "kernels": sorted(kernels), "opcodes": sorted(opcodes), "counts": rows, "rounds": rounds,
        "seconds": seconds,
    }  # fmt: skip


def plant_all(machine: Machine, case: str) -> dict[str, str]:
    """What was found of each fault planted in a case, by name; empty where nothing was."""
    found, wrong = {}, unclean(machine, case)
    for plant in [plant for plant in PLANTED if plant.case == case]:
        if wrong:
            found[plant.name] = f"not planted: {wrong}"
            continue
        try:
            found[plant.name] = run_plant(plant, machine)
            sweep()
        except LookupError as broken:
            found[plant.name] = ""
            print(f"cannot plant: {broken}", flush=True)
        print(f"planted: {plant.name} ({plant.case}): {found[plant.name] or 'NOT FOUND'}", flush=True)
    return found


MACHINE = Machine()  # of this process
RUNS = all_cases()


def work(part: sharing.Part) -> dict[str, dict[str, Any]]:
    """What became of a part's cases, planted faults, sums and layers, each printed as well."""
    found: dict[str, dict[str, Any]] = {section: {} for section in sharing.SECTIONS}
    for name in part.cases:
        found["cases"][name] = result = run_case(name, RUNS[name], MACHINE)
        print(f"{name}: {result['error'] or 'right'}, {result['seconds']} s", flush=True)
    for case in part.planted:
        found["plants"] |= plant_all(MACHINE, case)
    for backend in part.sums:
        found["sums"] |= sum_cases.sums(MACHINE, backend)
    for name, row in found["sums"].items():
        print(f"sums of 13 fraction bits: {name}: {row}", flush=True)
    for kind in part.layers:
        found["layers"][kind] = layer_cases.report(kind, MACHINE)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description="run every kernel's PTX on the CPU")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name has this in it; `sums`, `layer`: those alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each case there")
    parser.add_argument("--write", action="store_true", help="rewrite this Triton version's part of counts.json")
    parser.add_argument("--missing", action="store_true", help="only cases that counts.json lacks for this Triton")
    parser.add_argument("--processes", type=int, default=sharing.PROCESSES, help="how many run at once")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs every case, or with --missing those that have no counts: leave --only out")
    prepare()
    kept = speed.recorded(triton.__version__) if arguments.missing else {}
    known = {kernel.rsplit(" ", 1)[0] for kernel in kept}
    only, cases = arguments.only, [name for name in RUNS if arguments.only in name and name not in known]
    planted = () if only or arguments.missing else dict.fromkeys(plant.case for plant in PLANTED)
    sums = sharing.BACKENDS if only in ("", "sums") and not arguments.missing else ()
    layers = tuple(RECIPES) if only in ("", "layer") and not arguments.missing else ()
    found = sharing.perform(work, sharing.parts(cases, planted, sums, layers), arguments.processes)
    results = found["cases"]
    failed = [name for name, result in results.items() if result["error"]]
    opcodes = {opcode for result in results.values() for opcode in result["opcodes"]}
    kernels = {kernel for result in results.values() for kernel in result["kernels"]}
    print(f"Triton {triton.__version__}: {len(results) - len(failed)} of {len(results)} cases right, {len(kernels)} "
          f"kernels, {len(opcodes)} opcodes, {sum(r['seconds'] for r in results.values()):.0f} s")  # fmt: skip
    if arguments.write:
        counts = {kernel: row for result in results.values() for kernel, row in result["counts"].items()}
        speed.write(triton.__version__, kept | counts)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"triton": triton.__version__} | found))
    return 1 if failed or any(report["wrong"] for report in found["layers"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
