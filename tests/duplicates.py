"""Repeated code: pairs of places that share six or more lines, the same or alike but for names, strings and numbers.

    python -m tests.duplicates [--most N]

Blank lines, comments, docstrings, imports and lone punctuation are passed over and white space is folded; data and
prose files are not read. A run of lines is six lines in a row of what is left. Two runs match when their lines are the
same, or when they are the same after every name, string and number was replaced by its kind; a match of the second sort
needs 27 tokens, for fields of a dataclass or arguments one a line look alike everywhere and say nothing. A run that
stands in more than eight places is a habit of the language, and left out. A pair is two files, or a file and itself,
with all the runs that they share: the longest is named.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import keyword
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import guards

ROOT = Path(__file__).resolve().parent.parent
MIN_LINES, MIN_TOKENS, MAX_PLACES = 6, 27, 8
CODE_ENDINGS, CODE_NAMES = (".py", ".sh", ".sbatch"), ("Makefile", "Dockerfile", "run")
TOKEN = re.compile(
    r"""(?P<string>[rbfu]{0,2}(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'))|(?P<comment>\#.*)"""
    r"""|(?P<number>\d[\w.]*)|(?P<name>[^\W\d]\w*)|(?P<sign>\S)""",
    re.IGNORECASE,
)
KIND = {"string": "S", "number": "0", "name": "N"}


@dataclass(frozen=True)
class Line:
    number: int
    exact: str
    shape: str


@dataclass(frozen=True)
class Pair:
    """The longest run that two places share; `lines` counts its lines, `exact` is false where names differ."""

    first: str
    first_lines: tuple[int, int]
    second: str
    second_lines: tuple[int, int]
    lines: int
    exact: bool

    def __str__(self) -> str:
        ends = [
            f"{name}:{start}-{end}"
            for name, (start, end) in ((self.first, self.first_lines), (self.second, self.second_lines))
        ]
        return f"{' ~ '.join(ends)}  {self.lines} lines{'' if self.exact else ', other names'}"


def code_files(root: Path) -> Iterator[Path]:
    """Source and build files of the project: what `guards.TEXT` names, less data and prose."""
    tops = (root / name for name in guards.TOP_FILES if (root / name).is_file())
    for path in itertools.chain(guards.files_under(root, *guards.TEXT), tops):
        if path.suffix in CODE_ENDINGS or path.name in CODE_NAMES:
            yield path


def shape(line: str) -> str:
    """Names, strings and numbers replaced by their kind; keywords and signs stay, comments go."""
    tokens = []
    for match in TOKEN.finditer(line):
        kind, text = match.lastgroup or "sign", match.group()
        if kind == "comment":
            break
        tokens.append(text if kind == "name" and keyword.iskeyword(text) else KIND.get(kind, text))
    return " ".join(tokens)


def code_lines(path: Path) -> list[Line]:
    """The lines of a file that count."""
    text = path.read_text(errors="replace")
    passed = _prose_and_imports(text) if path.suffix == ".py" else set()
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        exact = " ".join(line.split())
        if number not in passed and not exact.startswith("#") and re.search(r"\w", exact):
            found.append(Line(number, exact, shape(exact)))
    return found


def _prose_and_imports(text: str) -> set[int]:
    passed: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        lone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if lone or isinstance(node, ast.Import | ast.ImportFrom):
            passed.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return passed


def pairs(root: Path) -> list[Pair]:
    """Every pair of places below `root`, most shared lines first."""
    files = {str(path.relative_to(root)): code_lines(path) for path in code_files(root)}
    exact = _matches({name: [line.exact for line in lines] for name, lines in files.items()}, 0)
    alike = _matches({name: [line.shape for line in lines] for name, lines in files.items()}, MIN_TOKENS)
    found = []
    for first, second in sorted(exact.keys() | alike.keys()):
        same = exact.get((first, second), set())
        starts = same | alike.get((first, second), set())
        at, other, length = _longest(starts)
        ends = [
            (files[name][start].number, files[name][start + length - 1].number)
            for name, start in ((first, at), (second, other))
        ]
        found.append(Pair(first, ends[0], second, ends[1], length, bool(same)))
    return sorted(found, key=lambda pair: (-pair.lines, pair.first, pair.second))


def _matches(files: dict[str, list[str]], min_tokens: int) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Pairs of files -> where a run of MIN_LINES starts in the one and in the other."""
    places = defaultdict(list)
    for name in sorted(files):
        lines = files[name]
        for start in range(len(lines) - MIN_LINES + 1):
            places[tuple(lines[start : start + MIN_LINES])].append((name, start))
    found = defaultdict(set)
    for run, at in places.items():
        if 2 <= len(at) <= MAX_PLACES and sum(line.count(" ") + 1 for line in run) >= min_tokens:
            for (first, start), (second, other) in itertools.combinations(at, 2):
                if first != second or other - start >= MIN_LINES:  # else they overlap: a list of like lines
                    found[first, second].add((start, other))
    return found


def _longest(starts: set[tuple[int, int]]) -> tuple[int, int, int]:
    """The longest run made of runs that start one line after the other: (start, other start, lines)."""
    best, length = (0, 0), 0
    for start, other in sorted(starts):
        if (start - 1, other - 1) not in starts:
            steps = next(step for step in itertools.count(1) if (start + step, other + step) not in starts)
            if steps > length:
                best, length = (start, other), steps
    return (*best, length + MIN_LINES - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the pairs; they are places to look at, and no failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.duplicates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--most", type=int, default=20, metavar="N", help="how many pairs are listed (20)")
    arguments = parser.parse_args(argv)
    found = pairs(ROOT)
    exact = sum(pair.exact for pair in found)
    print(f"{len(found)} pairs of places share {MIN_LINES} or more lines, {exact} of them to the letter")
    for pair in found[: arguments.most]:
        print(pair)
    return 0


if __name__ == "__main__":
    sys.exit(main())
