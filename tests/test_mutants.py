"""Mutation testing on a small tree made here: what is changed, what is left, which tests run, and what is reported."""

import subprocess
from pathlib import Path

import pytest

from tests import mutant_tests, mutants, mutations

ROOT = Path(__file__).resolve().parent.parent


def changes(source):
    """{(kind, line after)} of a function's body, or of a whole module where it starts at the margin."""
    if source.startswith((" ", "\n")) or ("\n" not in source and not source.startswith("def")):
        source = f"def f(a, b):\n    {source.strip()}\n"
    return {(found.kind, found.after) for found in mutations.mutations(source)}


@pytest.mark.parametrize(
    ("before", "kind", "after"),
    [
        *(("x = a < b", "comparison", "x = a <= b"), ("x = (a) == (b)", "comparison", "x = (a) != (b)")),
        *(("x = a not in b", "comparison", "x = a in b"), ("x = 1 < a <= b", "comparison", "x = 1 < a < b")),
        *(("x = a is None", "comparison", "x = a is not None"), ("x = é + b - c", "arithmetic", "x = é + b + c")),
        *(("x = a // b", "arithmetic", "x = a % b"), ("x = a * b", "arithmetic", "x = a / b")),
        *(("a += b", "arithmetic", "a -= b"), ("a += b", "deleted", "pass"), ("a.append(b)", "deleted", "pass")),
        *(("x = a and b", "boolean", "x = a or b"), ("x = not a", "not removed", "x = a")),
        *(("x = a[0]", "constant", "x = a[1]"), ("x = 1", "constant", "x = 0"), ("x = 5", "constant", "x = 6")),
        *(("x = True", "constant", "x = False"), ("x = 0.5", "constant", "x = 1.0")),
        *(("x = 1 if a else 2", "condition", "x = 1 if not (a) else 2"),),
        *(("x = max(a, b)", "min and max", "x = min(a, b)"), ("x = a.amin(b)", "min and max", "x = a.amax(b)")),
        *(("x = f(a, b=c, d=e)", "argument dropped", "x = f(a, d=e)"),),
        *(("x = f(a, b=c)", "argument dropped", "x = f(a)"), ("x = f(b=c)", "argument dropped", "x = f()")),
        *(("x = a[:b]", "slice", "x = a[:(b) + 1]"), ("x = a[b:]", "slice", "x = a[(b) + 1:]")),
    ],
)
def test_every_kind_changes_its_line_and_no_more(before, kind, after):
    assert (kind, after) in changes(before)


def test_conditions_loops_and_results():
    source = "def f(a) -> bool:\n    while a:\n        if a:\n            break\n        continue\n    return g(a)\n"
    assert {
        *(("condition", "while not (a):"), ("condition", "if not (a):")),
        *(("loop", "continue"), ("loop", "break"), ("result", "return not (g(a))")),
    } == changes(source)
    assert changes("def f(a) -> int | None:\n    return g(a)\n") == {("result", "return None")}
    assert changes("def f(a) -> int:\n    return g(a)\n") == set()
    assert len(changes("def f(a) -> bool:\n    return a == b\n")) == 1  # the comparison's own change negates it


@pytest.mark.parametrize(
    "source",
    [
        *('"""Doc: 1 < 2."""', "assert a < 1", "raise ValueError(f'{a + 1} and', 1, b=2)", "logger.info(a, 1, b=2)"),
        *("x = f'{a + 1}'", "x = 'text'", "import a.b", "logging.warning(a + 1)", "zip(a, b, strict=True).x"),
        "def __repr__(self):\n    return self.a + 1\n",
        "def f(a: Literal[1], *, b: x[1 + 1]) -> tuple[1]:\n    c: x[1] = a\n",
        "@decorator(1, b=2)\nclass A(B, c=1):\n    x: int\n",
        "if TYPE_CHECKING:\n    x = 1\n",
        "if __name__ == '__main__':\n    f(1)\n",
        "x = f(a < b, c=d)\ny = not x\nf.append(x)\n",  # at import: only numbers and bools change there
    ],
)
def test_what_no_test_should_notice_is_left(source):
    assert changes(source) == set()


def test_a_mutation_is_one_line_of_the_source_and_all_of_them_compile():
    source = (ROOT / "tests" / "mutations.py").read_text()
    found = mutations.mutations(source)
    assert len(found) > 50 and len({(m.line, m.after) for m in found}) == len(found)
    for mutation in found:
        mutant = mutation.apply(source)
        differ = [i for i, (a, b) in enumerate(zip(source.split("\n"), mutant.split("\n"), strict=True), 1) if a != b]
        assert differ == [mutation.line]
        compile(mutant, "mutant", "exec")


def test_the_draw_is_even_over_modules_and_the_seed_decides_it():
    assert sorted(mutations.slots({"a": 9, "b": 1, "c": 9, "d": 0}, 5, 1)) == ["a", "a", "b", "c", "c"]
    assert len(mutations.slots({"a": 2, "b": 1}, 100, 0)) == 3
    many = {str(number): 1 for number in range(20)}
    assert mutations.slots(many, 20, 1) == mutations.slots(many, 20, 1) != mutations.slots(many, 20, 2)
    found = mutations.mutations("def f(a, b):\n" + "    x = a[7]\n" * 40 + "    return a < b\n")
    orders = [[m.line for m in mutations.draw(found, seed)] for seed in ("1", "1", "2")]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [m.line for m in found]
    first = [next(mutations.draw(found, str(seed))).kind for seed in range(40)]
    assert 10 < first.count("comparison") < 30  # one of 41 mutations, and one of two kinds


TREE = {
    "fp8moe/__init__.py": "",
    "fp8moe/layers/__init__.py": "",
    "fp8moe/layers/norm.py": "LIMIT = 4\n\n\ndef clip(x):\n    return max(x, LIMIT)\n",
    "fp8moe/layers/loose.py": "def double(x):\n    return x + x\n",
    "fp8moe/train/__init__.py": "",
    "fp8moe/train/loop.py": (
        "from fp8moe.layers.norm import clip\n\n\n"
        "def count(x):\n    while x < 9:\n        x = x + 1\n    return clip(x)\n"
    ),
    "tests/layers/test_norm.py": (
        "from fp8moe.layers.norm import clip\n\n\ndef test_clip():\n    assert clip(2) == 4 and clip(5) == 5\n"
    ),
    "tests/train/conftest.py": "from fp8moe.train import loop\n",
    "tests/train/test_all.py": "def test_all():\n    from fp8moe.train.loop import count\n    assert count(3) == 9\n",
    "tests/cli/test_door.py": "COMMAND = ['-m', 'fp8moe.layers.norm']\ndef test_wrong():\n    assert not COMMAND\n",
    "pytest.ini": "[pytest]\naddopts = --import-mode=importlib\nmarkers =\n    gpu\n    slow\n",
}


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_the_closest_tests_come_first(tree):
    closeness = mutant_tests.Closeness(tree)
    norm, loop, loose = (tree / "fp8moe" / name for name in ("layers/norm.py", "train/loop.py", "layers/loose.py"))
    assert closeness.candidates(norm) == [(0, "tests/layers/test_norm.py"), (2, "tests/cli/test_door.py")]
    assert closeness.candidates(loop) == [(1, "tests/train/test_all.py")]
    assert closeness.candidates(loose) == []
    (tree / "tests/layers/test_norm.py").unlink()  # then the two that are near: one import and two, and another folder
    assert mutant_tests.Closeness(tree).candidates(norm) == [
        (2, "tests/cli/test_door.py"),
        (3, "tests/train/test_all.py"),
    ]
    (tree / "tests/train/test_all.py").write_text("# four ranks\nfrom fp8moe.train.loop import count\n")
    assert mutant_tests.Closeness(tree).candidates(norm) == [(2, "tests/cli/test_door.py")]  # it is slow, and so 5 away
    assert mutant_tests.Closeness(tree).candidates(loop) == [(1, "tests/train/test_all.py")]
    (tree / "tests/mutants.toml").write_text('"fp8moe/layers/loose.py" = ["tests/train/test_all.py"]\n')
    assert mutant_tests.Closeness(tree).candidates(loose) == [(0, "tests/train/test_all.py")]


def test_a_set_keeps_to_its_seconds_and_starts_with_the_cheapest():
    seconds = {"own": 20.0, "far": 1.0, "long": 30.0, "near": 2.0}
    measured = {name: mutant_tests.Measured(value) for name, value in seconds.items()}
    measured["broken"] = mutant_tests.Measured(0.1, "fails without mutation")
    candidates = [(0, "own"), (0, "broken"), (1, "long"), (1, "near"), (3, "far"), (3, "never measured")]
    assert mutant_tests.choose(candidates, measured) == ["near", "far", "own"]
    assert mutant_tests.choose([(2, "long")], {"long": mutant_tests.Measured(90.0)}) == ["long"]


def test_mutants_are_caught_survive_or_hang_and_the_tree_stays(tree, monkeypatch):
    monkeypatch.setattr(mutants, "GRACE", 6.0)
    before = {name: (tree / name).read_bytes() for name in TREE}
    report = mutants.run(tree, ["layers", "train"], count=50, seed=3, seconds=200, jobs=2)
    assert {name: (tree / name).read_bytes() for name in TREE} == before
    ended = {result.after: result.outcome for result in report.results}
    assert ended["return min(x, LIMIT)"] == ended["LIMIT = 5"] == "caught"
    assert ended["return x - x"] == "survived" and report.untested == ["fp8moe/layers/loose.py"]
    assert ended["x = x - 1"] == ended["x = x + 0"] == "timeout"
    assert ended["while x <= 9:"] == "caught"
    assert report.unusable == {"tests/cli/test_door.py": "fails without mutation: test_wrong"}
    lines = list(mutants.show(report))
    assert "   0 / 1    fp8moe/layers/loose.py  no test of it ran" in lines
    assert "fp8moe/layers/loose.py:2: return x + x -> return x - x" in lines
    assert lines[-1].startswith("caught 7 of 8 mutants, 88% (2 by time); apart 0 without effect, 0 ")


def test_a_change_without_effect_is_counted_apart(tree):
    entry = "fp8moe/layers/loose.py | return x + x | return x - x | x is 0 in this model\n"
    (tree / "tests" / "mutants_equivalent.txt").write_text("# path | before | after | why\n" + entry)
    report = mutants.run(tree, ["layers"], count=50, seed=0, seconds=200, jobs=1)
    assert [result.after for result in report.of("equivalent")] == ["return x - x"]
    assert report.of("survived") == [] and report.share() == 1.0


def test_no_mutant_starts_late(tree):
    report = mutants.run(tree, ["layers"], count=2, seed=0, seconds=0, jobs=1)
    assert [result.outcome for result in report.results] == ["not run"] * 2 and report.share() == 0.0


def test_a_folder_that_is_not_there_is_one_sentence(tree):
    with pytest.raises(SystemExit, match="--folder loose is not a folder"):
        mutants.modules(tree, ["loose"])


def test_how_a_run_ends():
    ran = mutant_tests.Ran
    assert mutants.outcome_of(ran(0, "")) == mutants.outcome_of(ran(5, "")) == "survived"
    assert mutants.outcome_of(ran(1, "")) == mutants.outcome_of(ran(-11, "")) == "caught"
    assert mutants.outcome_of(ran(None, "")) == "timeout"
    assert mutants.outcome_of(ran(2, "ERROR collecting tests/test_a.py")) == "broken"


def test_the_list_of_changes_without_effect_is_kept_up():
    """Each entry names a file that is there, a line that it holds, and a reason."""
    for line in (ROOT / mutants.EQUIVALENT).read_text().splitlines():
        if line and not line.startswith("#"):
            path, _, rest = line.partition(" | ")
            held = {text.strip() for text in (ROOT / path).read_text().splitlines()}
            before = [text for text in held if rest.startswith(f"{text} | ")]
            assert before, f"{path} holds no such line: {rest}"
            assert len(rest[len(max(before, key=len)) :].split(" | ")) >= 3, f"{line}: the reason is missing"
