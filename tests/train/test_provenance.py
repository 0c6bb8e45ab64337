"""The commit and the versions that a checkpoint names."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp8moe
from fp8moe.train import provenance


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the package seems to lie in."""
    folder = tmp_path / "checkout" / "fp8moe"
    folder.mkdir(parents=True)
    monkeypatch.setattr(fp8moe, "__file__", str(folder / "__init__.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    provenance.commit.cache_clear()
    yield folder
    provenance.commit.cache_clear()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_checkouts(package: Path) -> None:
    git = ["git", "-C", str(package), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True, timeout=30)
    assert provenance.commit() is None, "a checkout without a commit"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True, timeout=30)
    provenance.commit.cache_clear()
    head = (package / ".git" / "HEAD").read_text().split()[1]
    assert provenance.commit() == (package / ".git" / head).read_text().strip()


def test_there_is_none_outside_a_checkout_or_without_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.commit() is None
    provenance.commit.cache_clear()
    monkeypatch.setenv("PATH", str(package))
    assert provenance.commit() is None


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package", "torch", "numpy"))
    own = {"python": platform.python_version(), "fp8moe": fp8moe.__version__}
    assert provenance.versions.__wrapped__() == own | {
        name: importlib.metadata.version(name) for name in ("torch", "numpy")
    }
