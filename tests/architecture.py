"""Architecture report: sizes, import direction, import cycles, repeated code, and what one training step enters.

    python -m tests.architecture [--files] [--json FILE] [--no-step]

The figures are read from the files of fp8moe/ and kernels/, so they follow a file that moves. The limits stand in
tests/test_architecture.py and tests/test_architecture_report.py. The last lines are measured: the FP8 quickstart (with
mixture of experts and multi-token prediction) runs on one process with short sequences, and a profile function watches
the second call of `train_step`. It counts the files and functions of the product that were entered in any thread.
Lambdas, comprehensions and generator expressions are part of the function that holds them, and counted only in
the line that says so (Python 3.12 has no code of its own for comprehensions, so that line depends on the version);
methods that `dataclass` writes stand in no file and are left out.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests import duplicates, guards

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("fp8moe", "kernels")
FLAT_FOLDER = "fp8moe/parallel"
STEP_FUNCTION, STEP_NUMBER = "train_step", 2
# Three steps, for the last one also counts what FP8 casts lose, which ordinary steps do not.
STEP_SETTINGS = (
    *("experiment=quickstart", "steps=3", "seq_len=32", "batch.sequences=2", "validation.samples=2"),
    "checkpoint.at_end=false",
)
STEP_TIMEOUT = 300


@dataclass(frozen=True)
class Longest:
    """The file or function with the most lines."""

    name: str
    lines: int

    def __str__(self) -> str:
        return f"{self.lines} lines  {self.name}"


@dataclass(frozen=True)
class Step:
    """What one training step enters: files, functions as file:line name, and those with lambdas and the like."""

    files: list[str]
    functions: list[str]
    code_objects: int


def product_files(root: Path) -> list[Path]:
    """Every Python file of the product; `fp8moe/kernels` is a link and its files count once."""
    return list(guards.files_under(root, *PRODUCT, suffix=".py"))


def file_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def longest_function(root: Path, *, kernels: bool) -> Longest:
    """The longest function, of device kernels (under a jit) or of all others."""
    found = [Longest("none", 0)]
    for path in product_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_kernel = any(ast.unparse(d).partition("(")[0].split(".")[-1] == "jit" for d in node.decorator_list)
                if is_kernel == kernels:
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    found.append(Longest(f"{path.relative_to(root)}:{node.lineno} {node.name}", lines))
    return max(found, key=lambda longest: longest.lines)


def module_imports(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the product that it imports when it is itself imported; imports in functions are later."""
    modules = {guards.module_name(root, path): path for path in product_files(root)}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        later = _function_lines(path)
        targets = (found.target for found in guards.imports(root, path) if found.line not in later)
        graph[name] = {module for target in targets if (module := _module_of(target, modules)) not in ("", name)}
    return graph


def _function_lines(path: Path) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _module_of(target: str, modules: Mapping[str, Path]) -> str:
    """The module that an import leads to: `package.module.name` is `package.module`; '' outside the product."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def folder_imports(root: Path, graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same between the product's folders, one level below fp8moe/; a file beside the folders is its own."""
    folders: dict[str, set[str]] = {}
    for name, targets in graph.items():
        here = _folder(name)
        folders.setdefault(here, set()).update(folder for t in targets if (folder := _folder(t)) != here)
    return folders


def _folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other: the strongly connected components of two or more nodes, sorted."""
    reached = {node: _reach(graph, node) for node in graph}
    found = {
        tuple(sorted(other for other in reached[node] if node in reached.get(other, ())))
        for node in graph
        if node in reached[node]
    }
    return [list(circle) for circle in sorted(found)]


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left.extend(graph.get(node, ()))
    return seen


def files_beside_folders(root: Path, folder: str = FLAT_FOLDER) -> list[str]:
    """Modules that stand in a folder itself, not in one below it; `__init__.py` is none."""
    return sorted(path.name for path in (root / folder).glob("*.py") if path.name != "__init__.py")


def watch_step(run: Callable[[], int], root: Path, name: str = STEP_FUNCTION, number: int = STEP_NUMBER) -> Step:
    """Call `run`, and say which code of the product the call number `number` of function `name` entered."""
    inside = tuple(str(root.resolve() / folder) + os.sep for folder in PRODUCT)
    entered: set[CodeType] = set()
    step: list[FrameType] = []
    calls = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if step:
            if event == "call":
                entered.add(frame.f_code)
            elif event == "return" and frame is step[0]:
                step.clear()
        elif event == "call" and frame.f_code.co_name == name and _real(frame.f_code).startswith(inside):
            calls += 1
            if calls == number:
                step.append(frame)
                entered.add(frame.f_code)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        code = run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    if code or calls < number:
        raise RuntimeError(f"the run must call {name} {number} times: it did {calls} times and returned {code}")
    ours = [code for code in entered if _real(code).startswith(inside)]
    where = {code: str(Path(_real(code)).relative_to(root.resolve())) for code in ours}
    functions = {f"{where[c]}:{c.co_firstlineno} {c.co_qualname}" for c in ours if not c.co_name.startswith("<")}
    return Step(sorted(set(where.values())), sorted(functions), len(ours))


def _real(code: CodeType) -> str:
    return os.path.realpath(code.co_filename)


def quickstart_step(root: Path, out: Path) -> None:
    """Run the quickstart in this process and write what its second step entered to `out`."""

    def run() -> int:
        from fp8moe.__main__ import main

        with tempfile.TemporaryDirectory() as folder:
            return main(["train", *STEP_SETTINGS, f"run_dir={folder}/run"])

    step = watch_step(run, root)
    out.write_text(json.dumps(dataclasses.asdict(step)))


def measure_step(root: Path) -> Step:
    """The same in a process of its own, so that nothing is imported here and no profile function is left behind."""
    call = "import sys, pathlib, tests.architecture as a; a.quickstart_step(*map(pathlib.Path, sys.argv[1:]))"
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{ROOT}"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        command = [sys.executable, "-c", call, str(root), str(out)]
        done = subprocess.run(
            command, cwd=root, env=keep | threads, capture_output=True, text=True, timeout=STEP_TIMEOUT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the quickstart's step could not be counted:\n{done.stderr.strip()[-2000:]}")
        return Step(**json.loads(out.read_text()))


def figures(root: Path, step: Step | None) -> dict[str, Any]:
    """Every figure of the report, by its title in the table."""
    files = product_files(root)
    lines = {str(path.relative_to(root)): file_lines(path) for path in files}
    graph = module_imports(root)
    found = duplicates.pairs(root)
    longest = max(lines, key=lambda name: lines[name])
    table: dict[str, Any] = {}
    for title, names in _by_folder([str(path.relative_to(root)) for path in files]):
        table[f"files, {title}"] = len(names)
        table[f"files, {title}, without __init__"] = sum(not name.endswith("__init__.py") for name in names)
    table |= {
        "lines": sum(lines.values()),
        "lines a file, median": statistics.median(n for name, n in lines.items() if not name.endswith("__init__.py")),
        "longest file": str(Longest(longest, lines[longest])),
        "longest function": str(longest_function(root, kernels=False)),
        "longest kernel": str(longest_function(root, kernels=True)),
        "imports that go up": len(guards.floor_violations(root)),
        "circles between modules": len(circles(graph)),
        "circles between folders": len(circles(folder_imports(root, graph))),
        f"files in {FLAT_FOLDER} itself": len(files_beside_folders(root)),
        "pairs that share 6 or more lines": len(found),
        "pairs, of them to the letter": sum(pair.exact for pair in found),
    }
    if step is not None:
        table |= {"files a step enters": len(step.files), "functions a step enters": len(step.functions)}
        table["functions, with lambdas and comprehensions"] = step.code_objects
    return table


def _by_folder(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    yield "all", names
    for folder in PRODUCT:
        yield folder, [name for name in names if name.startswith(f"{folder}/")]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.architecture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", action="store_true", help="also list the files that a training step enters")
    parser.add_argument("--no-step", action="store_true", help="leave out the training step, which runs for seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the step's functions")
    arguments = parser.parse_args(argv)
    step = None if arguments.no_step else measure_step(ROOT)
    table = figures(ROOT, step)
    width = max(map(len, table))
    print("\n".join(f"{title:{width}}  {value}" for title, value in table.items()))
    if step is not None and arguments.files:
        print("\n".join(["", *step.files]))
    if arguments.json is not None:
        listed = {} if step is None else {"step": dataclasses.asdict(step)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(table | listed, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
