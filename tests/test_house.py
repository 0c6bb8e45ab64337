"""Set-up, packaging, launchers and documents of the repository.

make and the launchers run for real with a fake Python interpreter that logs its arguments: the tests check which
commands they run, and in which environment.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import guards

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    """Package -> version of constraints/NAME.txt and of what it reads."""
    found = {}
    for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(line.removeprefix("-c ").removesuffix(".txt"))
        elif line and not line.startswith("#"):
            found |= [line.split("==")]
    return found


# A fake python: logs its arguments and OMP_NUM_THREADS, and "makes" a virtual environment by copying itself.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$(dirname "$(dirname "$0")")"): $* [OMP=${OMP_NUM_THREADS:-}]" >> "$LOG"
if [ "${1:-} ${2:-}" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
case "$*" in *"${FAIL_ON:-no such command}"*) exit 3 ;; esac
"""


def run(command, cwd, **environment):
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return subprocess.run(
        command, cwd=cwd, env=keep | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def python(tmp_path):
    """The path of a fake interpreter, tmp_path/host/bin/python."""
    path = tmp_path / "host" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)
    return path


@pytest.fixture
def make(tmp_path, python):
    """`make(*words)` in a copy of the files that set-up needs; returns (exit code, the log's lines, stderr)."""
    tree, log = tmp_path / "tree", tmp_path / "log"
    tree.mkdir()
    (tree / "constraints").mkdir()
    for name in ("Makefile", "pyproject.toml", *(f"constraints/{one}.txt" for one in ("base", "cpu", "cuda"))):
        (tree / name).write_bytes((ROOT / name).read_bytes())

    def call(*words, **environment):
        log.write_text("")
        done = run(["make", f"PYTHON={python}", *words], tree, LOG=str(log), **environment)
        return done.returncode, log.read_text().splitlines(), done.stderr

    return call


def test_the_first_call_sets_up_and_the_second_installs_nothing(make, tmp_path):
    code, lines, _ = make("train", "ARGS=model.dim=64 seed=1")
    assert code == 0
    installs = [line for line in lines if "pip install" in line]
    assert any("-m venv .venv" in line for line in lines)
    assert len(installs) == 2 and all(" -c constraints/" in line for line in installs)
    assert lines[-1] == ".venv: -m fp8moe train --nproc auto experiment=quickstart model.dim=64 seed=1 [OMP=]"
    code, lines, _ = make("test")
    how = "-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0"
    assert (code, lines) == (0, [f".venv: -m pytest -m not gpu {how} [OMP=1]"])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pins_are_those_of_the_machine_or_of_the_caller(kind, make, tmp_path):
    """A folder of its own in front of PATH has an nvidia-smi that sees a GPU, or none; PINS has the last word."""
    (tmp_path / "tools").mkdir()
    smi = tmp_path / "tools" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n" if kind == "cuda" else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    if kind == "cpu" and list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    path = f"{smi.parent}:{os.environ['PATH']}"
    _, lines, _ = make("setup", PATH=path)
    assert sum(f"-c constraints/{kind}.txt" in line for line in lines) == 2
    other = {"cpu": "cuda", "cuda": "cpu"}[kind]
    _, lines, _ = make("-B", "setup", f"PINS={other}", PATH=path)
    assert sum(f"-c constraints/{other}.txt" in line for line in lines) == 2


@pytest.mark.parametrize("name", ["constraints/base.txt", "constraints/cpu.txt", "pyproject.toml"])
def test_changed_pins_install_again_into_the_same_environment(name, make, tmp_path):
    make("setup", "PINS=cpu")
    later = (tmp_path / "tree" / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "tree" / name, (later, later))
    _, lines, _ = make("setup", "PINS=cpu")
    assert sum("pip install" in line for line in lines) == 2
    assert not any("-m venv" in line for line in lines)


@pytest.mark.parametrize("step", ["import sys", "install --disable-pip-version-check --quiet", "-e .[dev]"])
def test_a_failed_set_up_stops_there_and_is_tried_again(step, make):
    code, lines, _ = make("train", FAIL_ON=step)
    assert code != 0 and step in lines[-1]
    code, lines, _ = make("train")
    assert code == 0 and sum("pip install" in line for line in lines) == 2


def test_a_python_without_venv_is_one_sentence(make):
    code, _, complaint = make("train", FAIL_ON="-m venv")
    assert code != 0 and "cannot make a virtual environment: install its venv module" in complaint


@pytest.mark.parametrize("venv", ["VENV=", "VENV=none"])
def test_without_venv_the_given_python_runs_and_nothing_is_installed(venv, make, tmp_path):
    code, lines, _ = make("train", venv)
    assert (code, lines) == (0, ["host: -m fp8moe train --nproc auto experiment=quickstart [OMP=]"])
    assert not (tmp_path / "tree" / ".venv").exists()


@pytest.mark.parametrize(
    ("target", "command"),
    [
        *(("train", "fp8moe train"), ("test", "pytest"), ("test-gpu", "pytest")),
        *(("check", "ruff check"), ("check", "ruff format"), ("check", "mypy"), ("check", "importlinter")),
        ("check", "tests.architecture"),
    ],
)
def test_the_failure_of_a_command_is_the_failure_of_make(target, command, make):
    code, lines, _ = make("VENV=", target, FAIL_ON=command)
    assert code != 0 and command in lines[-1]
    assert make("VENV=", target)[0] == 0


def test_benchmarks_run_one_by_one_on_the_device_asked_for(make, tmp_path):
    (tmp_path / "tree" / "benchmarks").mkdir()
    assert make("VENV=", "bench")[0] != 0  # nothing to run is no success
    for name in ("bench_a.py", "bench_b.py", "harness.py"):
        (tmp_path / "tree" / "benchmarks" / name).touch()
    _, lines, _ = make("VENV=", "bench", "ARGS=--quick")
    options = "--device cpu --json runs/bench/bench_{}-cpu.json --quick [OMP=]"
    assert lines == [f"host: -m benchmarks.bench_{name} {options.format(name)}" for name in "ab"]
    assert make("VENV=", "bench", FAIL_ON="bench_a")[0] != 0
    _, lines, _ = make("VENV=", "bench-gpu", "ARGS=--only correctness")
    assert lines == ["host: -m benchmarks.gpu --out runs/bench --only correctness [OMP=]"]


def test_ci_runs_check_and_test_and_stops_at_the_first_failure(tmp_path):
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "Makefile").write_text("check:\n\t@echo CHECK; exit $(FAIL)\ntest:\n\t@echo TEST\n")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    done = run(["bash", ".ci/run"], tmp_path, FAIL="0")
    assert (done.returncode, done.stdout.split()) == (0, ["CHECK", "TEST"])
    done = run(["bash", ".ci/run"], tmp_path, FAIL="1")
    assert done.returncode != 0 and "TEST" not in done.stdout


def test_pins_are_exact_and_satisfy_what_the_project_asks_for():
    cpu, cuda = pins("cpu"), pins("cuda")
    assert (cpu["torch"], cpu["triton"]) == ("2.13.0", "3.8.0")
    assert cpu.keys() == cuda.keys() and {name for name in cpu if cpu[name] != cuda[name]} <= {"torch", "triton"}
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["dev"], *extras["hf"], "setuptools>=77.0.3"):
        wanted = Requirement(text)
        if wanted.name != PROJECT["name"]:
            assert wanted.specifier.contains(cpu[wanted.name]), text
            assert wanted.specifier.contains(cuda[wanted.name]), text
    for name, version in (*cpu.items(), *cuda.items()):
        assert re.fullmatch(r"[a-z0-9-]+", name) and re.fullmatch(r"\d[0-9a-z.]*", version), (name, version)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints", "Makefile", ".ci/run", "docker/Dockerfile"])
def test_set_up_names_no_place_to_download_from(name):
    for path in (ROOT / name).glob("*") if (ROOT / name).is_dir() else [ROOT / name]:
        assert not re.search(r"https?://|index-url|find-links|--trusted-host", path.read_text())


def test_the_wheel_holds_kernels_and_configs(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    expected = {"fp8moe/__init__.py"}
    for path in guards.files_under(ROOT, "fp8moe", "kernels", "configs", "benchmarks/results"):
        inside = path.relative_to(ROOT)
        (tree / inside).parent.mkdir(parents=True, exist_ok=True)
        (tree / inside).write_bytes(path.read_bytes())
        if path.suffix in (".py", ".yaml"):
            expected.add(str(inside) if inside.parts[0] == "fp8moe" else f"fp8moe/{inside}")
    for name in ("kernels", "configs"):
        (tree / name).mkdir(exist_ok=True)
        (tree / "fp8moe" / name).symlink_to(f"../{name}")
    (tree / "fp8moe/plan/records").symlink_to("../../benchmarks/results")
    expected |= {f"fp8moe/plan/records/{path.name}" for path in (tree / "benchmarks/results").glob("*-h100.json")}
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = run([sys.executable, "-c", build], tree)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected <= names, sorted(expected - names)
    assert {name.split("/")[0] for name in names} == {"fp8moe", f"fp8moe-{PROJECT['version']}.dist-info"}


def test_the_package_knows_its_version_and_loads_no_torch():
    code = "import sys, fp8moe; print(fp8moe.__version__, 'torch' in sys.modules)"
    assert run([sys.executable, "-c", code], ROOT).stdout.split() == [PROJECT["version"], "False"]


def launched(script, tmp_path, python, *words, **environment):
    log = tmp_path / "log"
    log.write_text("")
    done = run([str(ROOT / "launch" / script), *words], ROOT, LOG=str(log), PYTHON=str(python), **environment)
    return done, log.read_text().strip()


def test_torchrun_on_one_node(tmp_path, python):
    done, line = launched("torchrun.sh", tmp_path, python, "seed=1", "run_dir=a b", NPROC="4")
    assert done.returncode == 0, done.stderr
    assert line == (
        "host: -m torch.distributed.run --nnodes 1 --node-rank 0 --nproc-per-node 4 --master-addr 127.0.0.1"
        " --master-port 29500 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --max-restarts 0"
        " -m fp8moe train seed=1 run_dir=a b [OMP=1]"
    )


def test_torchrun_on_many_nodes_takes_its_place_from_the_environment(tmp_path, python):
    many = {"NNODES": "3", "MASTER_ADDR": "n0", "MASTER_PORT": "1234", "OMP_NUM_THREADS": "6"}
    _, line = launched("torchrun.sh", tmp_path, python, **many, SLURM_NODEID="2")
    assert "--nnodes 3 --node-rank 2 --nproc-per-node gpu --master-addr n0 --master-port 1234" in line
    assert line.endswith("[OMP=6]")
    assert "--node-rank 1 " in launched("torchrun.sh", tmp_path, python, **many, SLURM_NODEID="2", NODE_RANK="1")[1]


def test_many_nodes_without_an_address_is_one_sentence(tmp_path, python):
    done, line = launched("torchrun.sh", tmp_path, python, NNODES="2")
    assert (done.returncode, line) == (2, "")
    assert done.stderr.strip() == "NNODES=2 needs MASTER_ADDR, the address of node 0 that all nodes reach"


def test_slurm_starts_torchrun_on_every_node_and_warns_before_the_limit(tmp_path, python):
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in (("scontrol", "echo n7; echo n8"), ("srun", 'shift; SLURM_NODEID=1 exec "$@"')):
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "seed=1"]
    log = tmp_path / "log"
    done = run(script, tmp_path, LOG=str(log), PYTHON=str(python), PATH=path, SLURM_JOB_ID="123456", **slurm)
    assert done.returncode == 0, done.stderr
    assert "--nnodes 2 --node-rank 1 --nproc-per-node gpu --master-addr n7 --master-port 23456" in log.read_text()
    (bin_ / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" >> "$LOG"\n')
    (bin_ / "srun").write_text("#!/usr/bin/env bash\nexit 1\n")
    for preempted in (False, True):  # only then it is queued again
        run_dir = tmp_path / f"run {preempted}"
        run_dir.mkdir()
        (run_dir / ("preempted" if preempted else "starts.jsonl")).touch()
        log.write_text("")
        words = [*script, f"run_dir={run_dir}", "resume=auto"]
        done = run(words, tmp_path, LOG=str(log), PYTHON=str(python), PATH=path, SLURM_JOB_ID="123456", **slurm)
        assert (done.returncode, "requeue 123456" in log.read_text()) == (1, preempted), done.stderr
    assert "#SBATCH --signal=USR1@300" in (ROOT / "launch" / "slurm.sbatch").read_text()


def test_the_installed_torchrun_knows_every_option_of_the_launcher():
    done = run([sys.executable, "-m", "torch.distributed.run", "--help"], ROOT)
    options = re.findall(r"(?<=\s)--[a-z-]+", (ROOT / "launch" / "torchrun.sh").read_text())
    assert len(options) == 7
    assert [option for option in options if f"{option} " not in done.stdout] == []


def test_the_documents_exist_and_are_true():
    readme = (ROOT / "README.md").read_text()
    first_screen = "\n".join(readme.splitlines()[:25])
    assert "make train" in first_screen and "make test" in first_screen and "What you will see" in first_screen
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence and PROJECT["license"] == "Apache-2.0"
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ROOT.glob("*.md"):
        text = document.read_text()
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, document.name
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / link).exists(), f"{document.name} points to {link}, which is missing"


def test_the_readme_lists_every_command():
    tree = ast.parse((ROOT / "fp8moe" / "__main__.py").read_text())
    (table,) = (
        n.value for n in tree.body if isinstance(n, ast.AnnAssign) and getattr(n.target, "id", "") == "COMMANDS"
    )
    commands = set(ast.literal_eval(table))
    assert commands and commands == set(
        re.findall(r"^\| `fp8moe ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
