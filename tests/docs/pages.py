"""The pages of the documentation, and what a reader would type from them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HISTORY = ("CHANGELOG.md", "benchmarks/LOG.md")  # what commands were, not what they are
PLACEHOLDERS = {
    **dict.fromkeys(("RUN", "CHECKPOINT"), "runs/mine"),
    **{
        "HF_DIR": "models/released",
        "OUT": "out/new",
        "PATH": "runs/new",
        "FILE": "mine.jsonl",
        "PREFIX": "tokens/mine",
    },
    **{"PREFIX": "tokens/mine", "N": "2", "WORD": "batch", "NAMES": "norm", "URL": "runs/mine", "CLUSTER": "h100_8"},
}
_PLACEHOLDER = re.compile(r"(?<![A-Za-z_])([A-Z_]{1,10})(?![A-Za-z_])")
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
GPUS = 8  # of a node, where a launcher takes every GPU


@dataclass(frozen=True)
class Typed:
    """A command of a page.

    words: from behind `fp8moe` on, placeholders filled. block: it stands in a block of code, and so is whole; in a
    sentence it may be a piece. open: it had a placeholder or left something out. processes: that the launcher starts.
    """

    page: str
    line: int
    words: tuple[str, ...]
    block: bool
    open: bool
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: fp8moe {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Every page of the site that says what to type now."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("launch/**/*.md")]
    found += [ROOT / folder / "README.md" for folder in ("benchmarks", "docker", "kernels")]
    return sorted(page for page in found if str(page.relative_to(ROOT)) not in HISTORY)


def commands(page: Path) -> list[Typed]:
    """The commands of a page, in its order."""
    name = str(page.relative_to(ROOT))
    found = []
    for number, text, block in _texts(page.read_text(encoding="utf-8")):
        if (one := _typed(name, number, text, block)) is not None:
            found.append(one)
    return found


def _texts(text: str) -> Iterator[tuple[int, str, bool]]:
    """Line number, text and whether it is a line of a block, of every line of code and every span of code."""
    fence, whole, start = None, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fence = None if fence is not None else stripped.removeprefix("```")
        elif fence == "text":
            continue  # what a program says
        elif fence is not None or line.startswith("    ") or stripped.startswith("$ "):
            start = start if whole else number
            whole = f"{whole} {stripped}".strip()
            if whole.endswith("\\"):
                whole = whole[:-1]
                continue
            yield start, whole, True
            whole = ""
        else:
            for span in _SPAN.findall(line.replace(r"\|", "|")):
                yield number, span, False


def _typed(page: str, line: int, text: str, block: bool) -> Typed | None:
    try:
        words = shlex.split(text.removeprefix("$ "), comments=True)
    except ValueError:
        return None
    environment = {}
    while words and _ASSIGNMENT.fullmatch(words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    found = _behind_launcher(words, environment)
    if found is None:
        return None
    rest, processes = found
    filled, is_open = _fill(rest)
    return Typed(page, line, tuple(filled), block, is_open or "COMMAND" in rest, processes)


def _behind_launcher(words: list[str], environment: dict[str, str]) -> tuple[list[str], int] | None:
    """The words behind `fp8moe` and the number of processes that the launcher starts; None for another program."""
    nodes = int(environment.get("NNODES", "1"))
    match words:
        case ["fp8moe" | ".venv/bin/fp8moe", *rest] if rest:
            return rest, _option(rest, "--nproc", 4)
        case ["python" | ".venv/bin/python", "-m", "fp8moe", *rest]:
            return rest, _option(rest, "--nproc", 4)
        case ["torchrun", *options] if "fp8moe" in options:
            at = options.index("fp8moe")
            nodes = _option(options[:at], "--nnodes", 1)
            return options[at + 1 :], nodes * _option(options[:at], "--nproc-per-node", 1)
        case ["launch/torchrun.sh", *rest]:
            return [environment.get("COMMAND", "train"), *rest], nodes * int(environment.get("NPROC", GPUS))
        case ["sbatch", *rest] if "launch/slurm.sbatch" in rest:
            at = rest.index("launch/slurm.sbatch")
            return ["train", *rest[at + 1 :]], GPUS * _option(rest[:at], "--nodes", 2)
    return None


def _option(words: list[str], name: str, other: int) -> int:
    """The number behind `--name N` or `--name=N`; `other` where it is none; without the option 1 for --nproc."""
    for at, word in enumerate(words):
        key, _, value = word.partition("=")
        if key == name:
            value = value or (words[at + 1] if at + 1 < len(words) else "")
            return int(value) if value.isdigit() else other
    return 1 if name == "--nproc" else other


def _fill(words: list[str]) -> tuple[list[str], bool]:
    """The words with placeholders filled, without `...` and key=value, of alternatives a|b the first."""
    filled, is_open = [], False
    for word in words:
        plain = word.strip("[]") if word.startswith("[") or (word.endswith("]") and "[" not in word) else word
        if plain in ("...", "key=value", "|"):
            is_open = True
            continue
        first = plain.split("|")[0]
        new = _PLACEHOLDER.sub(lambda found: PLACEHOLDERS.get(found[1], found[1]), first)
        is_open = is_open or new != word
        filled.append(new)
    return filled, is_open


def links(page: Path) -> list[tuple[int, str]]:
    """Line number and target of every link of a page to a file, folder or heading of the repository."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.strip().startswith("```")
        if not fenced:
            bare = _SPAN.sub("", line)
            found += [(number, target) for target in _LINK.findall(bare) if not re.match(r"[a-z]+:", target)]
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule: lower case, words joined by hyphens, no punctuation."""
    found: set[str] = set()
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.strip().startswith("```")
        if not fenced and (heading := re.match(r"#{1,6} (.*)", line)):
            words = re.sub(r"[^\w\- ]", "", heading[1].replace("`", "").lower()).replace(" ", "-")
            found.add(words if words not in found else f"{words}-1")
    return found
