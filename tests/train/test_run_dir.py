"""One directory a run, and nothing written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.errors import ConfigError
from fp8moe.train.run_dir import check_run_dir, make_run_dir


def test_a_fresh_run_needs_an_empty_directory(tmp_path: Path) -> None:
    made = make_run_dir(str(tmp_path / "a" / "b"), "name", "none")
    assert made == tmp_path / "a" / "b" and (made / "logs").is_dir()
    make_run_dir(str(made), "name", "none")  # logs of a start that failed are no run
    (made / "metrics.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match="holds 1 entries and a fresh run needs an empty directory: use resume=auto"):
        make_run_dir(str(made), "name", "none")
    assert make_run_dir(str(made), "name", "auto") == made
    assert (made / "metrics.jsonl").read_text() == "kept"


def test_a_path_to_resume_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    check_run_dir(str(run), str(checkpoint))
    check_run_dir(str(run), str(run))
    check_run_dir(str(tmp_path / "new"), str(checkpoint))
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds 1 entries"):
        check_run_dir(str(other), str(checkpoint))


def test_the_working_directory_is_a_directory_like_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_run_dir(".", "none")
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="holds 1 entries"):
        check_run_dir(".", "none")


def test_what_can_be_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file and must be a directory"):
        check_run_dir(str(tmp_path / "file"), "auto")
    with pytest.raises(ConfigError, match="run_dir is not set: add run_dir=PATH"):
        check_run_dir(None, "auto")


def test_default_names_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    made = [make_run_dir(None, "name", "none") for _ in range(3)]
    assert [path.as_posix() for path in made] == [f"runs/20260101-000000-name{end}" for end in ("", "-2", "-3")]
