"""The wheel in an empty folder: what users get who install the package and have no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch.test_container import ROOT, copy


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from the checkout's files and unpacked."""
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("installed")
    copy(tree, ["."])
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tree,
        tree,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def fp8moe(installed: Path, folder: Path, *words: str) -> str:
    """What a command prints, run in `folder` with the wheel's files alone."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fp8moe", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_plans_tokenizes_trains_and_reports_from_an_empty_folder(installed, tmp_path):
    """On a text of its own: the embedded corpus, which takes ten seconds to prepare, is the container's."""
    code = "import fp8moe, fp8moe.kernels.fp8 as k; print(fp8moe.__file__, k.__file__)"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100).stdout
    assert [Path(one).is_relative_to(installed) for one in found.split()] == [True, True], found
    assert "tokens/s/GPU" in fp8moe(installed, tmp_path, "plan", "model=tiny", "cluster=h100_1")
    (tmp_path / "text.txt").write_text((ROOT / "CHANGELOG.md").read_text())
    fp8moe(installed, tmp_path, "tokenize", "--input", "text.txt", "--output", "text", "--vocab-size", "512")
    text = ["data=indexed", "data.paths=[text]", "model.vocab_size=512", "data.validation_share=0.1"]
    small = ["model=tiny", "steps=2", "batch.sequences=2", "seq_len=128", "run_dir=run", "device=cpu", *text]
    assert "step 2" in fp8moe(installed, tmp_path, "train", *small).replace("2/2", "step 2")
    fp8moe(installed, tmp_path, "report", "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
