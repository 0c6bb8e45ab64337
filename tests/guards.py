"""What keeps the house in shape: one function a rule, from the root of a tree to the sentences it breaks.

Every guard reads files and imports nothing, so it sees code that does not run yet, imports hidden inside functions, and
trees made up by a test. A guard returns violations as `path:line: rule`, an empty list when there are none. The floors
stand here a second time beside import-linter's contract on purpose: that one follows chains of imports, this one works
where import-linter is not installed, and a test holds the two lists equal.
"""

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLOORS = {
    "kernels": 0,
    "layers": 1,
    "schedule": 1,
    "profile": 1,
    "parallel": 2,
    "model": 3,
    "data": 3,
    "train": 4,
    "interop": 5,
    "plan": 5,
    "report": 5,
    "doctor": 5,
    "generate": 5,
    "post": 6,
    "cli": 7,
    "__main__": 8,
}
BESIDE = ("errors", "limits", "cuda_environment")  # files beside the floors, which import nothing of the project
NO_ERRORS = ("kernels", "layers")  # they raise plain ValueError
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 320, 60, 100
CODE = ("kernels", "fp8moe", "benchmarks", "tests")
TEXT = (*CODE, "configs", "constraints", "launch", "docker", "docs", ".ci")
TOP_FILES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml"),
    *(".gitignore", ".pre-commit-config.yaml"),
)
VAGUE = re.compile(r"(.*_)?(utils?|common|helpers?|misc)|managers?|manager_.*|.*_managers?")
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:home|root|work|farm|Users)/")
# Names and phrases that this project coined once and replaced by the field's own (CONTRIBUTING, "Words").
COINED = re.compile(
    r"\b(?:cargos?|islands?|legs?|letter box|sisters?|settle[sd]?|journal|borne|in vain|stayed away|under way"
    r"|stand-?ins?)\b",
    re.IGNORECASE,
)
PRODUCT_TEXT = ("kernels", "fp8moe", "benchmarks", "configs", "launch", "docker", "docs")
LEFT_OVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b")


@dataclass(frozen=True)
class Import:
    line: int
    target: str  # dotted; for `from a import b` it is a.b


def files_under(root: Path, *folders: str, suffix: str = "") -> Iterator[Path]:
    """Files below the named folders of `root`, sorted; links and caches are not entered."""
    for folder in folders:
        for here, inner, names in os.walk(root / folder):
            inner[:] = sorted(name for name in inner if name != "__pycache__" and not name.endswith(".egg-info"))
            for name in sorted(names):
                path = Path(here, name)
                if name.endswith(suffix) and not name.endswith(".pyc") and not path.is_symlink():
                    yield path


def module_name(root: Path, path: Path) -> str:
    """Dotted import name; `kernels/` is imported as `fp8moe.kernels`."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fp8moe")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path, path: Path) -> list[Import]:
    """Every import of a file, at any depth, relative ones resolved, and `importlib.import_module("literal")`."""
    package = module_name(root, path).split(".")
    if path.name != "__init__.py":
        package.pop()
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            found += [Import(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            literals = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [Import(node.lineno, literals[0])] if literals else []
    return found


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _within(target: str, *modules: str) -> bool:
    return any(target == module or target.startswith(module + ".") for module in modules)


def _where(root: Path, path: Path, line: int = 1) -> str:
    return f"{path.relative_to(root)}:{line}"


def _floor(root: Path, path: Path) -> str:
    parts = module_name(root, path).split(".")
    return parts[1] if len(parts) > 1 else ""


def floor_violations(root: Path) -> list[str]:
    """Imports that go up or sideways, files that stand on no floor, and `kernels` under any name but fp8moe.kernels."""
    broken = []
    for path in files_under(root, "kernels", "fp8moe", suffix=".py"):
        here = _floor(root, path)
        if here not in (*FLOORS, *BESIDE, ""):
            broken.append(f"{_where(root, path)}: {here} stands on no floor: move it onto one of {', '.join(FLOORS)}")
            continue
        for found in imports(root, path):
            if (reason := _refused(here, found.target)) is not None:
                broken.append(f"{_where(root, path, found.line)}: {reason}")
    for path in files_under(root, *CODE, suffix=".py"):
        for found in imports(root, path):
            if _within(found.target, "kernels"):
                broken.append(f"{_where(root, path, found.line)}: import kernels as fp8moe.kernels")
    return broken


def _refused(here: str, target: str) -> str | None:
    """Why a file on floor `here` ('' is the package itself) may not import `target`; None when it may."""
    if _within(target, "tests", "benchmarks"):
        return f"the package may not import {target}"
    if here == "":
        return f"fp8moe/__init__.py imports nothing, and so not {target}"
    if not _within(target, "fp8moe"):
        return None
    there = target.partition(".")[2].partition(".")[0]
    if here in BESIDE:
        return f"{here} imports nothing of the project, and so not {target}"
    if there == "errors":
        return f"{here} raises plain ValueError and may not import {target}" if here in NO_ERRORS else None
    if there in (here, "", "__version__", "limits", "cuda_environment"):
        return None
    if there not in FLOORS:
        return f"{target} stands on no floor"
    if FLOORS[there] >= FLOORS[here]:
        return f"{here} (floor {FLOORS[here]}) may not import {target} (floor {FLOORS[there]}): imports go down only"
    return None


def distributed_violations(root: Path) -> list[str]:
    """torch.distributed below `parallel`, imported or reached through an attribute."""
    broken = []
    for path in files_under(root, "kernels", "fp8moe", suffix=".py"):
        if FLOORS.get(_floor(root, path), 9) >= FLOORS["parallel"]:
            continue
        lines = [found.line for found in imports(root, path) if _within(found.target, "torch.distributed")]
        lines += [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "distributed" and _last_name(node.value) == "torch"
        ]
        broken += [f"{_where(root, path, line)}: torch.distributed below parallel" for line in sorted(set(lines))]
    return broken


def device_code_violations(root: Path) -> list[str]:
    """triton (gluon is part of it) above `kernels`."""
    return [
        f"{_where(root, path, found.line)}: {found.target} above kernels"
        for path in files_under(root, "fp8moe", suffix=".py")
        for found in imports(root, path)
        if _within(found.target, "triton", "gluon")
    ]


def configuration_violations(root: Path) -> list[str]:
    """hydra or omegaconf anywhere but in `cli`."""
    return [
        f"{_where(root, path, found.line)}: {found.target} outside cli"
        for path in files_under(root, "kernels", "fp8moe", "benchmarks", suffix=".py")
        if _floor(root, path) != "cli"
        for found in imports(root, path)
        if _within(found.target, "hydra", "omegaconf")
    ]


def size_violations(root: Path) -> list[str]:
    """Files and functions longer than one sitting; a function under a triton or gluon jit may be longer."""
    broken = []
    for path in files_under(root, *CODE, suffix=".py"):
        text = path.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE:
            broken.append(f"{_where(root, path)}: file of {lines} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = MAX_KERNEL if any(_is_jit(decorator) for decorator in node.decorator_list) else MAX_FUNCTION
            if length > limit:
                broken.append(f"{_where(root, path, node.lineno)}: {node.name} has {length} lines, at most {limit}")
    return broken


def _is_jit(decorator: ast.expr) -> bool:
    return _last_name(decorator.func if isinstance(decorator, ast.Call) else decorator) == "jit"


def twin_violations(root: Path) -> list[str]:
    """Ops without a twin in kernels/reference/ or without a test, or whose public functions differ from the twin's."""
    kernels, reference = root / "kernels", root / "kernels" / "reference"
    ops = {path.stem for path in kernels.glob("*.py") if "backend.op(" in path.read_text()}
    twins = {path.stem for path in reference.glob("*.py") if not path.stem.startswith("_")}
    broken = [f"kernels/{op}.py: no twin kernels/reference/{op}.py" for op in sorted(ops - twins)]
    broken += [f"kernels/reference/{op}.py: no op kernels/{op}.py" for op in sorted(twins - ops)]
    for op in sorted(ops):
        if not (root / "tests" / "kernels" / f"test_{op}.py").is_file():
            broken.append(f"kernels/{op}.py: no tests/kernels/test_{op}.py")
    for op in sorted(ops & twins):
        ours, theirs = signatures(kernels / f"{op}.py"), signatures(reference / f"{op}.py")
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                broken.append(
                    f"kernels/{op}.py: {name}{ours.get(name, ' is missing')}, "
                    f"its twin {name}{theirs.get(name, ' is missing')}"
                )
    return broken


def signatures(path: Path) -> dict[str, str]:
    """Public functions of a file with their arguments, defaults and annotations; `torch.Tensor` counts as `Tensor`."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            found[node.name] = re.sub(r"\btorch\.(?=[A-Z])", "", f"({ast.unparse(node.args)}){returns}")
    return found


def name_violations(root: Path) -> list[str]:
    """Files and folders named for nothing in particular."""
    return [
        f"{path.relative_to(root)}: say what it is for: a helper lives with its first user, or on the floor below"
        for path in files_under(root, *CODE, suffix=".py")
        if any(VAGUE.fullmatch(part) for part in path.relative_to(root).with_suffix("").parts)
    ]


def docstring_violations(root: Path) -> list[str]:
    """Public modules without a docstring; an empty file needs none."""
    return [
        f"{_where(root, path)}: a public module starts with its design note"
        for path in files_under(root, "kernels", "fp8moe", "benchmarks", suffix=".py")
        if (not path.stem.startswith("_") or path.stem.startswith("__"))
        and path.read_text().strip()
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]


def package_violations(root: Path) -> list[str]:
    """Folders with modules but no __init__.py: a wheel would leave them out."""
    folders = {path.parent for path in files_under(root, "kernels", "fp8moe", suffix=".py")}
    return [
        f"{folder.relative_to(root)}: holds modules but no __init__.py"
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ]


def symlink_violations(root: Path) -> list[str]:
    """fp8moe/kernels and fp8moe/configs must be relative links to their folders beside fp8moe/."""
    broken = []
    for name in ("kernels", "configs"):
        link = root / "fp8moe" / name
        if not link.is_symlink() or os.readlink(link) != f"../{name}":
            broken.append(f"fp8moe/{name}: must be a symbolic link to ../{name}")
        elif not link.is_dir():
            broken.append(f"fp8moe/{name}: its target {name}/ is missing")
    return broken


def text_violations(
    root: Path,
    pattern: re.Pattern[str],
    rule: str,
    folders: tuple[str, ...] = TEXT,
    top_files: tuple[str, ...] = TOP_FILES,
) -> list[str]:
    """Lines of the project's own text files that match `pattern`."""
    broken = []
    for path in (*files_under(root, *folders), *(root / name for name in top_files)):
        if not path.is_file() or b"\0" in path.read_bytes()[:1024]:  # pictures
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                broken.append(f"{_where(root, path, number)}: {rule}")
    return broken


def machine_path_violations(root: Path) -> list[str]:
    """Absolute paths of somebody's machine."""
    return text_violations(root, MACHINE_PATH, "an absolute path of one machine")


def left_over_violations(root: Path) -> list[str]:
    """Marks of unfinished work."""
    return text_violations(root, LEFT_OVER, "a mark of unfinished work: finish it, or say it in an issue")


def coined_word_violations(root: Path) -> list[str]:
    """Coined words where the field has its own; CONTRIBUTING, CHANGELOG and measured records may quote them."""
    found = text_violations(root, COINED, "a coined word: use the field's own", PRODUCT_TEXT, ("README.md",))
    return [violation for violation in found if ".json:" not in violation]
