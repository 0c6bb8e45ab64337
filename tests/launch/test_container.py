"""The container's recipe without a Docker daemon: each of its RUN lines executed, in order, as the user that it names.

The base image is a virtual environment that has torch, Triton, NumPy and setuptools and nothing else of this project's;
the container's folders are folders of this machine. What stays unproven: a real base image, its CUDA, and layers.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "docker" / "Dockerfile"
# What a PyTorch image has in its Python; with torch's own requirements.
BASE = (
    "pip",
    "torch",
    "torchgen",
    "functorch",
    "triton",
    "numpy",
    "numpy.libs",
    "setuptools",
    "_distutils_hack",
)
BASE += ("sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions.py")
COPIED = ("constraints", "pyproject.toml", "README.md", "LICENSE", "fp8moe", "kernels", "configs", "benchmarks/results")


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", RECIPE.read_text()).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


@pytest.fixture
def folder():
    """A folder that every user may enter, as tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="container-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def base_image(folder: Path) -> Path:
    """A virtual environment with what BASE names, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True, timeout=120)
    here = Path(sysconfig.get_paths()["purelib"])
    (there,) = (folder / "python" / "lib").glob("python*/site-packages")
    for name in BASE:
        stem = name.split(".")[0].lower()
        for found in (here / name, *here.glob(f"{stem}-*.dist-info")):
            if found.exists() and not (there / found.name).exists():
                (there / found.name).symlink_to(found)
    return folder / "python" / "bin"


def as_user(user: int | None) -> list[str]:
    """What runs a command as another user, if this one may: who reads all, since Python may lie in a home of root's."""
    if user is None or os.getuid():
        return []
    rights = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search", "--clear-groups"]
    return ["setpriv", f"--reuid={user}", f"--regid={user}", *rights]


def copy(folder: Path, sources: list[str]) -> None:
    for name in COPIED if sources == ["."] else sources:
        source, target = ROOT / name, folder / (name if sources == ["."] else Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, target)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_run_line_of_the_recipe(folder):
    python, work, home = base_image(folder), folder / "work", folder / "home"
    environment = {"PATH": f"{python}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    user, ran = None, 0
    for word, rest in instructions():
        if word == "WORKDIR":
            work.mkdir()
        elif word == "COPY":
            copy(work, rest.split()[:-1])
        elif word == "ENV":
            environment |= dict(pair.split("=") for pair in rest.split())
            environment["HOME"] = str(home) if "HOME" in environment else str(folder)
        elif word == "USER":
            user = int(rest.split(":")[0])
        elif word == "RUN":
            done = subprocess.run(
                [*as_user(user), "sh", "-c", rest if os.getuid() == 0 else re.sub(r"&& chown .*", "", rest)],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
            )
            said = done.stdout + done.stderr
            if "No matching distribution" in said and "retrying" in said.lower():
                pytest.skip("the package index can't be reached, from which the recipe installs")
            assert done.returncode == 0, f"{rest}\n{said[-3000:]}"
            ran += 1
    assert ran == 4 and user not in (None, 0), "training must not run as root"
    assert list((work / "runs").iterdir()) == []


def test_the_recipe_ends_as_a_user_without_rights_and_tries_more_than_help():
    words = instructions()
    users = [i for i, (word, _) in enumerate(words) if word == "USER"]
    checks = [i for i, (word, rest) in enumerate(words) if word == "RUN" and "fp8moe train" in rest]
    assert len(users) == 1 and len(checks) == 1 and checks[0] > users[0]
    assert words[users[0]][1] == "1000:1000"
