"""The architecture report: its figures on a small tree made here, and the limits that the project itself keeps."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import architecture, duplicates

ROOT = Path(__file__).resolve().parent.parent
MAX_PARALLEL = 12  # modules in fp8moe/parallel itself; more belong in a folder below it, or on another floor

BODY = """    total = {start}
    for item in items:
        if item > {limit}:
            total += item * {factor}
    logger.info("{text}", total)
    {result} = total // len(items)
    return {result}
"""
HEAD = "def mean(items):\n"
TREE = {
    "kernels/__init__.py": "",
    "kernels/gemm.py": '"""Op."""\n',
    "kernels/device.py": "@triton.jit(noinline=True)\ndef kernel(a):\n    b = a\n    return b\n",
    "fp8moe/__init__.py": "",
    "fp8moe/__main__.py": ("from fp8moe.train.loop import run\ndef main(argv):\n    run(3)\n    return 0\n"),
    "fp8moe/layers/__init__.py": "",
    "fp8moe/layers/linear.py": "from fp8moe.kernels import gemm\ndef forward(x):\n    return [y for y in x]\n",
    "fp8moe/parallel/__init__.py": "",
    "fp8moe/parallel/mesh.py": "def late():\n    from fp8moe.parallel import wire\n",
    "fp8moe/parallel/wire.py": "from fp8moe.parallel.mesh import late\n",
    "fp8moe/parallel/dispatch/__init__.py": "",
    "fp8moe/parallel/dispatch/hop.py": "",
    "fp8moe/train/__init__.py": "",
    "fp8moe/train/loop.py": (
        "import threading\nfrom fp8moe.layers.linear import forward\n"
        "def train_step(number):\n"
        "    if number == 1:\n        thread = threading.Thread(target=beside)\n        thread.start()\n"
        "        thread.join()\n    return forward([number])\n"
        "def beside():\n    return (lambda: 1)()\n"
        "def outside():\n    return 0\n"
        "def run(steps):\n    outside()\n    for number in range(steps):\n        train_step(number)\n    outside()\n"
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        write(tmp_path, name, text)
    (tmp_path / "fp8moe" / "kernels").symlink_to("../kernels")
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_no_modules_import_each_other_in_a_circle():
    graph = architecture.module_imports(ROOT)
    assert len(graph) > 50 and any(graph.values())
    assert architecture.circles(graph) == []
    assert architecture.circles(architecture.folder_imports(ROOT, graph)) == []


def test_parallel_holds_few_files_beside_its_folders():
    files = architecture.files_beside_folders(ROOT)
    assert 0 < len(files) <= MAX_PARALLEL, f"{len(files)} files in fp8moe/parallel, at most {MAX_PARALLEL}: {files}"


def test_the_figures_of_a_small_tree(tree):
    table = architecture.figures(tree, None)
    assert (table["files, all"], table["files, fp8moe"], table["files, kernels"]) == (14, 11, 3)
    assert table["files, fp8moe, without __init__"] == 6 and table["files, kernels, without __init__"] == 2
    assert table["lines"] == sum(len(text.splitlines()) for text in TREE.values())
    assert table["lines a file, median"] == 2.5
    assert table["longest file"] == "17 lines  fp8moe/train/loop.py"
    assert table["longest function"] == "6 lines  fp8moe/train/loop.py:3 train_step"
    assert table["longest kernel"] == "3 lines  kernels/device.py:2 kernel"
    assert table["imports that go up"] == 0 and table["files in fp8moe/parallel itself"] == 2
    write(tree, "fp8moe/layers/linear.py", "from fp8moe.train import loop\n")
    assert architecture.figures(tree, None)["imports that go up"] == 1


def test_a_circle_is_one_of_imports_that_run_at_once(tree):
    def found():
        graph = architecture.module_imports(tree)
        return architecture.circles(graph), architecture.circles(architecture.folder_imports(tree, graph))

    assert found() == ([], [])  # mesh imports wire inside a function
    write(tree, "fp8moe/parallel/mesh.py", "from fp8moe.parallel.dispatch import hop\n")
    write(tree, "fp8moe/parallel/dispatch/hop.py", "class A:\n    from fp8moe.parallel import wire\n")
    assert found() == ([["fp8moe.parallel.dispatch.hop", "fp8moe.parallel.mesh", "fp8moe.parallel.wire"]], [])
    write(tree, "kernels/gemm.py", "if True:\n    import fp8moe.layers\n")
    assert found()[1] == [["fp8moe.kernels", "fp8moe.layers"]]


def test_circles_are_strongly_connected_components():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert architecture.circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_the_step_counts_what_its_second_call_enters_in_any_thread(tree):
    step = architecture.measure_step(tree)
    assert step.files == ["fp8moe/layers/linear.py", "fp8moe/train/loop.py"]
    names = [function.split()[1] for function in step.functions]
    assert names == ["forward", "train_step", "beside"]  # neither outside() nor run(), and no lambda
    assert step.code_objects >= 4  # with the lambda, and the comprehension where it has code of its own


def test_a_run_with_too_few_steps_is_no_figure(tree):
    with pytest.raises(RuntimeError, match="must call train_step 2 times: it did 0 times and returned 0"):
        architecture.watch_step(lambda: 0, tree)
    assert sys.getprofile() is None and threading.getprofile() is None
    write(tree, "fp8moe/__main__.py", "def main(argv):\n    raise ValueError('broken')\n")
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        architecture.measure_step(tree)


def test_the_command_prints_the_table_and_writes_it(tmp_path):
    command = [sys.executable, "-m", "tests.architecture", "--no-step", "--json", str(tmp_path / "figures.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    table = json.loads((tmp_path / "figures.json").read_text())
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == list(table)
    assert table["imports that go up"] == 0


def copies(tree, first, second):
    for name, text in (("benchmarks/a.py", first), ("launch/b.sh", second)):
        write(tree, name, text)
    return [pair for pair in duplicates.pairs(tree) if "benchmarks/a.py" in (pair.first, pair.second)]


def body(**changes):
    words = {"start": 0, "limit": 3, "factor": 2, "text": "sum", "result": "mean"}
    return BODY.format(**words | changes)


def test_a_copy_is_seen_through_names_numbers_white_space_and_comments(tree):
    (pair,) = copies(tree, HEAD + body(), "# a script\nelse\n" + body().replace("    ", "  ").replace("\n", "\n\n"))
    assert (pair.first_lines, pair.second_lines, pair.lines, pair.exact) == ((2, 8), (3, 15), 7, True)
    (pair,) = copies(tree, HEAD + body(), "else\n" + body(start=1, limit=9, text="other words", result="average"))
    assert (pair.first_lines, pair.second_lines, pair.lines, pair.exact) == ((2, 8), (2, 8), 7, False)
    assert str(pair) == "benchmarks/a.py:2-8 ~ launch/b.sh:2-8  7 lines, other names"


def test_what_is_no_copy(tree):
    text = body()
    assert copies(tree, HEAD + text, text.replace(">", "<")) == []  # another sign
    five = "".join(text.splitlines(keepends=True)[:5])
    assert copies(tree, HEAD + five, five) == []
    fields = "".join(f"    field{i}: int\n" for i in range(8))
    assert copies(tree, f"class A:\n{fields}", fields.replace("field", "other")) == []  # too little in a line
    assert len(copies(tree, f"class A:\n{fields}", fields)) == 1
    imports = "".join(f"import module{i}.with_a_long.dotted_name as name{i}\n" for i in range(8))
    assert copies(tree, imports, imports.replace("module", "other")) == []
    assert copies(tree, f'"""Text.\n{text}"""\n', text) == []


def test_a_run_in_too_many_places_is_left_out(tree):
    for number in range(7):
        write(tree, f"tests/c{number}.py", HEAD + body())
    assert len(copies(tree, HEAD + body(), "")) == 7  # 8 places, 28 pairs: seven of them with a.py
    write(tree, "tests/c7.py", HEAD + body())
    assert copies(tree, HEAD + body(), "") == []


def test_a_file_is_compared_with_itself_but_a_list_of_like_lines_is_no_pair(tree):
    like = "".join(f'check("{i}", first={i}, second=[{i}], third=None)\n' for i in range(9))
    assert copies(tree, like, "") == []
    (pair,) = copies(tree, HEAD + body() + HEAD + body(), "")
    assert (pair.first_lines, pair.second_lines, pair.lines) == ((1, 8), (9, 16), 8)
