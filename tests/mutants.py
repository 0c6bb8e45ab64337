"""Mutation testing: break one line of a module, run its closest tests, and see whether they notice.

    python -m tests.mutants [--seed N] [--count N] [--folder F ...] [--seconds S] [--jobs N] [--json FILE]

The share of mutants that tests notice says more about them than the share of lines they run. Mutants are drawn evenly
over the modules of the given folders; the same seed on the same tree draws the same ones. Each runs in a copied tree,
so the working tree is never touched. Caught means that a test of the module's set failed, or ran into a limit of four
times what the set takes without mutation. A survivor is a line to look at: a missing test, or a change without effect,
which belongs in tests/mutants_equivalent.txt with the reason. Tests marked slow or gpu do not run here.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests import guards, mutant_tests, mutations

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("parallel", "schedule", "profile", "model", "layers", "train", "data")
EQUIVALENT = "tests/mutants_equivalent.txt"
BATCH = 5  # test files measured by one process
GRACE = 45.0  # seconds for starting and collecting, which the baseline of a test does not hold
CAUGHT, TIMEOUT, SURVIVED, EQUAL, BROKEN, LATE = "caught", "timeout", "survived", "equivalent", "broken", "not run"


@dataclass(frozen=True)
class Result:
    """One mutant: where, what, how it ended and after how many seconds."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    outcome: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before} -> {self.after}"


@dataclass
class Report:
    """All results, and what could not be asked: `unusable` tests by name, `untested` modules without a test."""

    results: list[Result] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)

    def of(self, *outcomes: str) -> list[Result]:
        return sorted((r for r in self.results if r.outcome in outcomes), key=lambda r: (r.path, r.line, r.after))

    def share(self) -> float:
        """Of the mutants that ran and are not known to be without effect, how many were caught."""
        return len(self.of(CAUGHT, TIMEOUT)) / max(1, len(self.of(CAUGHT, TIMEOUT, SURVIVED)))


def modules(root: Path, folders: Sequence[str]) -> dict[str, list[mutations.Mutation]]:
    """Path -> mutations, of every module below the folders, which are named from fp8moe/ or from the root."""
    below = [f"fp8moe/{name}" if (root / "fp8moe" / name).is_dir() else name for name in folders]
    below = [name[len("fp8moe/") :] if (root / name).is_symlink() else name for name in below]
    if missing := [name for name in below if not (root / name).is_dir()]:
        raise SystemExit(
            f"--folder {missing[0]} is not a folder of the tree: name one below fp8moe/, for example train"
        )
    found = guards.files_under(root, *below, suffix=".py")
    return {str(path.relative_to(root)): mutations.mutations(path.read_text()) for path in found}


def copy_tree(root: Path, to: Path) -> Path:
    """Copy what git tracks, and what it neither tracks nor ignores, as it stands in the working tree."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0"):
        path = root / name
        if name and (path.is_symlink() or path.is_file()):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to / name, follow_symlinks=False)
    return to


def equivalent(root: Path, result: Result) -> bool:
    """Whether the list of changes without effect holds this one; lines are matched by text, their number may change."""
    path = root / EQUIVALENT
    start = f"{result.path} | {result.before} | {result.after} | "
    return path.is_file() and any(line.startswith(start) for line in path.read_text().splitlines())


class Session:
    """One run: the copied trees, one a job, and what is known about the tests."""

    def __init__(self, root: Path, trees: Sequence[Path], deadline: float) -> None:
        self.root, self.deadline, self.num_jobs = root, deadline, len(trees)
        self.trees: queue.Queue[Path] = queue.Queue()
        for tree in trees:
            self.trees.put(tree)
        self.closeness = mutant_tests.Closeness(root)
        self.measured: dict[str, mutant_tests.Measured] = {}
        self.sets: dict[str, list[str]] = {}
        self.report = Report()
        self.lock = threading.Lock()

    def measure(self, paths: Sequence[str]) -> None:
        """The baseline: the tests of these modules, without mutation; then each module's set."""
        near = {path: self.closeness.candidates(self.root / path) for path in paths}
        names = sorted({name for found in near.values() for _, name in found})
        batches = max(self.num_jobs, -(-len(names) // BATCH))
        with ThreadPoolExecutor(self.num_jobs) as pool:
            for measured in pool.map(self._measure, [names[i::batches] for i in range(batches)]):
                self.measured |= measured
        self.sets = {path: mutant_tests.choose(near[path], self.measured) for path in paths}
        self.report.untested = sorted(path for path in paths if not self.sets[path])
        self.report.unusable = {
            name: m.reason for name, m in sorted(self.measured.items()) if m.reason and m.reason != "no test ran"
        }

    def _measure(self, names: list[str]) -> dict[str, mutant_tests.Measured]:
        if not names:
            return {}
        tree = self.trees.get()
        try:
            measured = mutant_tests.measure(tree, names)
        finally:
            self.trees.put(tree)
        for name, m in measured.items():
            print(f"without mutation {m.seconds:.0f}s {name} {m.reason}".rstrip(), file=sys.stderr)
        return measured

    def fill(self, path: str, draws: Iterator[mutations.Mutation]) -> None:
        """Try a module's next mutation; where one only breaks the import, the next takes its place."""
        while True:
            with self.lock:
                mutation = next(draws, None)
            if mutation is None:
                return
            result = self.attempt(path, mutation)
            with self.lock:
                self.report.results.append(result)
                print(f"[{len(self.report.results)}] {result.outcome} {result.seconds:.0f}s {result}", file=sys.stderr)
            if result.outcome != BROKEN:
                return

    def attempt(self, path: str, mutation: mutations.Mutation) -> Result:
        started = time.monotonic()
        outcome = LATE if started > self.deadline else self._outcome(path, mutation) if self.sets[path] else SURVIVED
        seconds = time.monotonic() - started
        result = Result(path, mutation.line, mutation.kind, mutation.before, mutation.after, outcome, seconds)
        return Result(**asdict(result) | {"outcome": EQUAL}) if self._known(result) else result

    def _known(self, result: Result) -> bool:
        return result.outcome == SURVIVED and equivalent(self.root, result)

    def _outcome(self, path: str, mutation: mutations.Mutation) -> str:
        names = self.sets[path]
        limit = GRACE + 4 * sum(self.measured[name].seconds for name in names)
        tree = self.trees.get()
        file = tree / path
        source = file.read_text()
        try:
            file.write_text(mutation.apply(source))
            _forget_bytecode(file)
            ran = mutant_tests.run_pytest(tree, ["-x", f"--timeout={int(limit)}", *names], limit)
        finally:
            file.write_text(source)
            _forget_bytecode(file)
            self.trees.put(tree)
        return outcome_of(ran)


def outcome_of(ran: mutant_tests.Ran) -> str:
    """What the end of a mutant's tests says about it."""
    if ran.code is None:
        return TIMEOUT
    if ran.code in (2, 4) and ("ERROR collecting" in ran.output or "while loading conftest" in ran.output):
        return BROKEN
    return SURVIVED if ran.code in (0, 5) else CAUGHT


def _forget_bytecode(file: Path) -> None:
    # Python compares time and size of a source, and a mutant may share both with the original.
    for cached in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        cached.unlink()


def run(root: Path, folders: Sequence[str], *, count: int, seed: int, seconds: float, jobs: int) -> Report:
    """Draw, measure, and try `count` mutants of the tree `root`."""
    deadline = time.monotonic() + seconds
    found = modules(root, folders)
    slots = mutations.slots({path: len(m) for path, m in found.items()}, count, seed)
    draws = {path: mutations.draw(found[path], f"{seed} {path}") for path in set(slots)}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(root, Path(folder, f"tree{job}")) for job in range(jobs)]
        session = Session(root, trees, deadline)
        print(f"{len(slots)} mutants in {len(draws)} of {len(found)} modules; their tests first", file=sys.stderr)
        session.measure(sorted(draws))
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(session.fill, path, draws[path]) for path in slots]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # an interrupt, for example: what runs is waited for, nothing else is started
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return session.report


def show(report: Report) -> Iterator[str]:
    """The report's lines: modules, survivors, and what stands apart."""
    for path in sorted({result.path for result in report.results}):
        ran = [r for r in report.of(CAUGHT, TIMEOUT, SURVIVED) if r.path == path]
        if ran:
            note = "  no test of it ran" if path in report.untested else ""
            yield f"{sum(r.outcome != SURVIVED for r in ran):4} / {len(ran):<4} {path}{note}"
    for outcome, title in (
        *((SURVIVED, "survived"), (EQUAL, f"without effect, see {EQUIVALENT}"), (LATE, "not run, for lack of time")),
    ):
        if some := report.of(outcome):
            yield from ("", f"{len(some)} {title}:", *map(str, some))
    if report.unusable:
        yield from ("", "Tests left out of every set:", *(f"{name}: {why}" for name, why in report.unusable.items()))
    ran, apart = report.of(CAUGHT, TIMEOUT, SURVIVED), report.of(EQUAL)
    caught, late = report.of(CAUGHT, TIMEOUT), len(report.of(TIMEOUT))
    yield ""
    yield (
        f"caught {len(caught)} of {len(ran)} mutants, {report.share():.0%} ({late} by time); apart {len(apart)} "
        f"without effect, {len(report.of(BROKEN))} that only broke an import, {len(report.of(LATE))} not run"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; survivors are no failure, a test that fails without mutation is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which mutants are drawn (0)")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many (100)")
    parser.add_argument("--folder", action="append", metavar="F", help="below fp8moe/; may be given again")
    parser.add_argument(
        "--seconds", type=float, default=1800, metavar="S", help="no mutant starts later than this (1800)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="mutants tried at once, each in its own tree (2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every mutant and its outcome")
    a = parser.parse_args(argv)
    folders = a.folder or [name for name in FOLDERS if (ROOT / "fp8moe" / name).is_dir()]
    started = time.monotonic()
    report = run(ROOT, folders, count=a.count, seed=a.seed, seconds=a.seconds, jobs=a.jobs)
    print("\n".join(show(report)))
    print(f"seed {a.seed}, folders {' '.join(folders)}, {a.jobs} jobs, {time.monotonic() - started:.0f} s")
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": a.seed, "folders": folders, "jobs": a.jobs, "share": report.share()}
        a.json.write_text(json.dumps(settings | asdict(report), indent=1) + "\n")
    return 1 if report.unusable else 0


if __name__ == "__main__":
    sys.exit(main())
