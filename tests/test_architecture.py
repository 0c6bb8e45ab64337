"""The architecture holds, and every guard of it can fail.

Each guard runs on the real tree, on a small sound tree made here, and on that tree with one thing broken: a guard that
always passes or always fails is caught.
"""

import re
import tomllib
from pathlib import Path

import pytest

from tests import guards

ROOT = Path(__file__).resolve().parent.parent

SOUND = {
    "kernels/__init__.py": "",
    "kernels/fp8.py": '"""Format."""\nimport torch\n',
    "kernels/gemm.py": (
        '"""Op."""\nfrom torch import Tensor\nfrom fp8moe.kernels import backend\n'
        'def gemm(a: Tensor, *, scale: float = 1.0) -> Tensor:\n    return backend.op("gemm")(a, scale=scale)\n'
        "def _check(a):\n    return a\n"
    ),
    "kernels/reference/__init__.py": "",
    "kernels/reference/gemm.py": (
        '"""Twin."""\nimport torch\n'
        "def gemm(a: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:\n    return a * scale\n"
    ),
    "kernels/triton/__init__.py": "",
    "kernels/triton/gemm.py": '"""Device."""\nimport triton\n',
    "fp8moe/__init__.py": '"""Package."""\n__version__ = "0"\n',
    "fp8moe/__main__.py": '"""Door."""\nfrom fp8moe.cli.train import main\n',
    "fp8moe/errors.py": '"""Errors."""\nfrom __future__ import annotations\n',
    "fp8moe/layers/__init__.py": "",
    "fp8moe/layers/linear.py": '"""Linear."""\nimport torch\nfrom fp8moe.kernels import gemm\nfrom . import norm\n',
    "fp8moe/layers/norm.py": '"""Norm."""\n',
    "fp8moe/parallel/__init__.py": "",
    "fp8moe/parallel/mesh.py": '"""Mesh."""\nimport torch.distributed as dist\nfrom ..errors import ConfigError\n',
    "fp8moe/model/__init__.py": "",
    "fp8moe/model/block.py": '"""Block."""\nfrom fp8moe.layers.linear import Linear\n',
    "fp8moe/data/__init__.py": "",
    "fp8moe/data/packing.py": '"""Packing."""\n',
    "fp8moe/train/__init__.py": "",
    "fp8moe/train/loop.py": '"""Loop."""\nfrom fp8moe import __version__, data, model\n',
    "fp8moe/cli/__init__.py": "",
    "fp8moe/cli/train.py": '"""Command."""\nimport hydra\nfrom omegaconf import OmegaConf\nimport fp8moe.train.loop\n',
    "benchmarks/bench_gemm.py": '"""Benchmark."""\nfrom fp8moe.kernels.gemm import gemm\n',
    "tests/kernels/test_gemm.py": "from fp8moe.kernels.gemm import gemm\n",
    "configs/train.yaml": "a: 1\n",
    "README.md": "Read ./home/notes and https://host/home/page.\n",
}
GUARDS = {
    name.removesuffix("_violations"): guard
    for name, guard in vars(guards).items()
    if name.endswith("_violations") and name != "text_violations"
}


def long_function(lines, decorator=""):
    return f'"""Op."""\n{decorator}def gemm(a):\n' + "    a = 1\n" * (lines - 1)


# (guard, file that is written or, with None, removed, its text, what the guard must say)
BREAKS = [
    ("floor", "fp8moe/layers/norm.py", '"""N."""\nimport fp8moe.model.block\n', "layers (floor 1) may not import"),
    ("floor", "fp8moe/model/block.py", '"""B."""\nfrom fp8moe.data import packing\n', "fp8moe.data.packing (floor 3)"),
    ("floor", "fp8moe/layers/norm.py", '"""N."""\ndef f():\n    from ..parallel import mesh\n', "norm.py:3: layers"),
    ("floor", "kernels/fp8.py", '"""F."""\nfrom fp8moe import layers\n', "kernels (floor 0) may not import fp8moe.lay"),
    (
        "floor",
        "fp8moe/train/loop.py",
        '"""L."""\nimport importlib\nimportlib.import_module("fp8moe.cli.train")\n',
        "cli",
    ),
    ("floor", "fp8moe/layers/norm.py", '"""N."""\nfrom fp8moe.errors import DataError\n', "raises plain ValueError"),
    ("floor", "fp8moe/errors.py", '"""E."""\nfrom fp8moe.kernels import fp8\n', "errors imports nothing"),
    ("floor", "fp8moe/limits.py", '"""L."""\nfrom fp8moe.errors import ConfigError\n', "limits imports nothing"),
    ("floor", "fp8moe/__init__.py", '"""P."""\nimport torch\n', "__init__.py imports nothing, and so not torch"),
    ("floor", "fp8moe/optim/adamw.py", '"""O."""\n', "optim stands on no floor"),
    ("floor", "fp8moe/tools.py", '"""T."""\n', "tools stands on no floor"),
    (
        "floor",
        "fp8moe/train/loop.py",
        '"""L."""\nfrom benchmarks import harness\n',
        "may not import benchmarks.harness",
    ),
    ("floor", "tests/kernels/test_gemm.py", "from kernels.gemm import gemm\n", "import kernels as fp8moe.kernels"),
    (
        "distributed",
        "fp8moe/layers/norm.py",
        '"""N."""\nfrom torch import distributed\n',
        "norm.py:2: torch.distributed",
    ),
    ("distributed", "kernels/fp8.py", '"""F."""\nimport torch\nx = torch.distributed.is_initialized\n', "fp8.py:3"),
    (
        "device_code",
        "fp8moe/layers/norm.py",
        '"""N."""\ndef f():\n    import triton.language as tl\n',
        "norm.py:3: tri",
    ),
    ("device_code", "fp8moe/train/loop.py", '"""L."""\nfrom triton.experimental import gluon\n', "above kernels"),
    ("configuration", "fp8moe/train/loop.py", '"""L."""\nimport omegaconf\n', "loop.py:2: omegaconf outside cli"),
    ("configuration", "fp8moe/__main__.py", '"""D."""\nfrom hydra import compose\n', "hydra.compose outside cli"),
    ("size", "fp8moe/layers/norm.py", '"""N."""\n' + "a = 1\n" * 320, "file of 321 lines, at most 320"),
    ("size", "kernels/gemm.py", long_function(61), "gemm.py:2: gemm has 61 lines, at most 60"),
    ("size", "kernels/triton/gemm.py", long_function(101, "@triton.jit\n"), "gemm has 101 lines, at most 100"),
    ("size", "tests/kernels/test_gemm.py", long_function(61), "gemm has 61 lines"),
    ("twin", "kernels/reference/gemm.py", None, "no twin kernels/reference/gemm.py"),
    ("twin", "kernels/reference/norm.py", '"""T."""\n', "kernels/reference/norm.py: no op kernels/norm.py"),
    ("twin", "tests/kernels/test_gemm.py", None, "no tests/kernels/test_gemm.py"),
    (
        "twin",
        "kernels/reference/gemm.py",
        '"""T."""\ndef gemm(a: Tensor, *, scale: float = 2.0) -> Tensor: ...\n',
        "2.0",
    ),
    ("twin", "kernels/reference/gemm.py", '"""T."""\ndef mm(a): ...\n', "its twin gemm is missing"),
    ("name", "fp8moe/layers/utils.py", '"""U."""\n', "fp8moe/layers/utils.py: say what it is for"),
    ("name", "fp8moe/train/common.py", '"""C."""\n', "say what it is for"),
    ("name", "tests/helpers.py", "", "say what it is for"),
    ("name", "fp8moe/train/manager_base.py", '"""M."""\n', "say what it is for"),
    ("name", "fp8moe/train/checkpoint_manager.py", '"""M."""\n', "say what it is for"),
    ("docstring", "fp8moe/layers/norm.py", "import torch\n", "norm.py:1: a public module starts with its design note"),
    ("docstring", "fp8moe/cli/__init__.py", "x = 1\n", "cli/__init__.py:1"),
    ("package", "fp8moe/cli/__init__.py", None, "fp8moe/cli: holds modules but no __init__.py"),
    ("machine_path", "configs/train.yaml", "path: /" + "home/someone/corpus\n", "train.yaml:1: an absolute path"),
    ("machine_path", "README.md", "ok\ncd /" + "work/main\n", "README.md:2: an absolute path"),
    (
        "left_over",
        "benchmarks/bench_gemm.py",
        '"""B."""\n# TO' + "DO: measure\n",
        "bench_gemm.py:2: a mark of unfinished",
    ),
    ("coined_word", "fp8moe/layers/norm.py", '"""The sisters of a norm."""\n', "norm.py:1: a coined word"),
    ("coined_word", "README.md", "ok\nA message under way.\n", "README.md:2: a coined word"),
    ("left_over", "configs/train.yaml", "# FIX" + "ME\n", "train.yaml:1: a mark"),
]


@pytest.fixture
def tree(tmp_path):
    for name, text in SOUND.items():
        write(tmp_path, name, text)
    for name in ("kernels", "configs"):
        (tmp_path / "fp8moe" / name).symlink_to(f"../{name}")
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("rule", GUARDS)
def test_the_project_keeps(rule):
    assert GUARDS[rule](ROOT) == []


@pytest.mark.parametrize("rule", GUARDS)
def test_a_sound_tree_passes(rule, tree):
    assert GUARDS[rule](tree) == []


@pytest.mark.parametrize(("rule", "name", "text", "says"), BREAKS)
def test_one_break_is_seen(rule, name, text, says, tree):
    if text is None:
        (tree / name).unlink()
    else:
        write(tree, name, text)
    violations = GUARDS[rule](tree)
    assert any(says in violation for violation in violations), violations


def test_limits_are_the_last_legal_sizes(tree):
    write(tree, "fp8moe/layers/norm.py", '"""N."""\n' + "a = 1\n" * 319)
    write(tree, "kernels/gemm.py", long_function(60))
    write(tree, "kernels/triton/gemm.py", long_function(100, "@gluon.jit(noinline=True)\n"))
    assert guards.size_violations(tree) == []


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_links_must_be_relative_and_lead_somewhere(name, tree):
    link = tree / "fp8moe" / name
    link.unlink()
    link.symlink_to(tree / name)
    assert guards.symlink_violations(tree) == [f"fp8moe/{name}: must be a symbolic link to ../{name}"]
    link.unlink()
    link.mkdir()
    assert guards.symlink_violations(tree) == [f"fp8moe/{name}: must be a symbolic link to ../{name}"]
    link.rmdir()
    link.symlink_to(f"../{name}")
    (tree / name).rename(tree / "elsewhere")
    assert guards.symlink_violations(tree) == [f"fp8moe/{name}: its target {name}/ is missing"]


def test_every_guard_has_a_break():
    assert {rule for rule, *_ in BREAKS} | {"symlink"} == set(GUARDS)


def test_import_linter_knows_the_same_floors():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    listed = [{name.strip(" ()") for name in layer.split("|")} for layer in reversed(layers)]
    floors = {name: floor for name, floor in guards.FLOORS.items() if name != "__main__"}
    assert listed == [{name for name in floors if floors[name] == floor} for floor in sorted(set(floors.values()))]


def test_files_that_make_test_begins_with_exist():
    """LONGEST of conftest.py, which is read as text: to import a conftest again would be to register it twice."""
    named = re.findall(r'^    "(\S+\.py)",$', (ROOT / "tests" / "conftest.py").read_text(), re.MULTILINE)
    assert named and [name for name in named if not (ROOT / "tests" / name).is_file()] == []
