"""Which tests a mutated module has to pass: the closest ones, the cheapest first, each known to pass without mutation.

Closest (0) is the test file of the module's own name, and what the table tests/mutants.toml adds where there is one;
then come tests by the number of imports between them and the module, a conftest.py or another helper on the path being
one. A test that names the module in its text, to start it as a process, counts as importing it. One of another folder
counts as one import farther; one that starts many processes, and is slow, as two where it does not import the module
itself. Tests that stand in tests/ itself are about the house, and no module's.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import guards

MOST_FILES, FARTHEST = 5, 2  # test files measured for a module, and how much farther than the first one may be
PROCESSES = re.compile(r"\b(?:ranks|torchrun|nproc|spawn)\b")  # a test file that starts many processes says so
SET_SECONDS = 40.0  # of tests a module's set may take, beyond the closest file
TEST_SECONDS = 60  # one test; longer ones fail the baseline and leave the set
BATCH_SECONDS = 600
PLUGINS = (
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_timeout",
)  # loading all that are installed takes longer than most tests


@dataclass(frozen=True)
class Measured:
    """A test file without mutation: how long its tests take; `reason` says why it can't be used, '' if it can."""

    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Ran:
    """A finished pytest: its exit code, None where it was ended for its time, and what it printed."""

    code: int | None
    output: str


class Closeness:
    """Distances between test files and modules, by the imports of one tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = list(guards.files_under(root, *guards.CODE, suffix=".py"))
        self.names = {path: guards.module_name(root, path) for path in paths}
        self.tests = {
            path: path.read_text() for path in paths if path.name.startswith("test_") and path.parent.name != "tests"
        }
        table = root / "tests" / "mutants.toml"
        self.table: dict[str, list[str]] = tomllib.loads(table.read_text()) if table.is_file() else {}
        self.importers: dict[str, set[str]] = defaultdict(set)
        for path in paths:
            for target in self._targets(path):
                self.importers[target].add(self.names[path])

    def _targets(self, path: Path) -> Iterable[str]:
        known = set(self.names.values())
        for found in guards.imports(self.root, path):
            target = found.target
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target:
                yield target
        if path.is_relative_to(self.root / "tests"):
            conftests = (folder / "conftest.py" for folder in path.parents)
            yield from (self.names[c] for c in conftests if c in self.names and c != path)

    def candidates(self, module: Path) -> list[tuple[int, str]]:
        """(distance, test file) from the closest on, MOST_FILES of them at most, none much farther than the first."""
        distances = self._distances(self.names[module])
        listed = self.table.get(str(module.relative_to(self.root)), [])
        found = []
        for test, text in self.tests.items():
            name = str(test.relative_to(self.root))
            distance = distances.get(self.names[test])
            beside = test.parent.name in module.parts
            if (beside and test.stem == f"test_{module.stem.strip('_')}") or name in listed:
                found.append((0, name))
            elif distance is not None or self.names[module] in text:
                distance = 1 if self.names[module] in text else distance or 1
                many = distance > 1 and PROCESSES.search(text) is not None
                found.append((distance + (not beside) + 2 * many, name))
        found.sort()
        return [(distance, name) for distance, name in found[:MOST_FILES] if distance <= found[0][0] + FARTHEST]

    def _distances(self, module: str) -> dict[str, int]:
        distances, edge, steps = {module: 0}, {module}, 0
        while edge:
            steps += 1
            edge = {name for target in edge for name in self.importers[target]} - distances.keys()
            distances |= dict.fromkeys(edge, steps)
        return distances


def choose(candidates: Sequence[tuple[int, str]], measured: Mapping[str, Measured]) -> list[str]:
    """A module's set, in the order it runs: the closest within SET_SECONDS, then sorted by distance and price."""
    usable = [(d, measured[name].seconds, name) for d, name in candidates if name in measured]
    usable = sorted(entry for entry in usable if not measured[entry[2]].reason)
    chosen: list[tuple[float, str]] = []
    total = 0.0
    for distance, seconds, name in usable:
        if not chosen or total + seconds <= SET_SECONDS:
            total += seconds
            chosen.append(((1 + distance) * (1 + seconds), name))
    return [name for _, name in sorted(chosen)]


def run_pytest(tree: Path, words: Sequence[str], seconds: float) -> Ran:
    """pytest in a tree and a process group of its own, which ends with it."""
    command = [sys.executable, "-m", "pytest", "-q", *PLUGINS, "-m", "not gpu and not slow", *words]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    process = subprocess.Popen(
        [*command, f"--basetemp={tree.parent / (tree.name + '-tmp')}"],
        cwd=tree,
        env=os.environ | threads | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return Ran(process.returncode, output)
    except subprocess.TimeoutExpired:
        return Ran(None, "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the tests started and did not end
        process.wait()


def measure(tree: Path, names: Sequence[str]) -> dict[str, Measured]:
    """Run test files without mutation, in one process; every one gets its seconds or the reason it can't be used."""
    report = tree.parent / f"{tree.name}.xml"
    report.unlink(missing_ok=True)
    words = [f"--junitxml={report}", "-o", "junit_family=xunit1", f"--timeout={TEST_SECONDS}", *names]
    ran = run_pytest(tree, words, BATCH_SECONDS)
    if ran.code not in (0, 1) or not report.is_file():
        if len(names) > 1:  # one of them breaks the run: find out which
            return {name: measured for single in names for name, measured in measure(tree, [single]).items()}
        return {names[0]: Measured(0.0, _reason(ran))}
    seconds, failed = defaultdict(float), {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("file", "")
        if case.find("skipped") is None:
            seconds[name] += float(case.get("time", "0"))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.setdefault(name, f"fails without mutation: {case.get('name')}")
    none = {name: "no test ran" for name in names if name not in seconds}
    return {name: Measured(seconds.get(name, 0.0), (none | failed).get(name, "")) for name in names}


def _reason(ran: Ran) -> str:
    if ran.code is None:
        return f"takes more than {BATCH_SECONDS} s without mutation"
    lines = ran.output.strip().splitlines()
    return "no test ran" if ran.code == 5 else f"pytest returned {ran.code}: {lines[-1] if lines else 'no output'}"
