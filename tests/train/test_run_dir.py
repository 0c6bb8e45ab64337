"""One directory a run, and nothing written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.errors import ConfigError
from fp8moe.train.run_dir import check_run_dir, claim, count_start, make_run_dir, mark_preempted
from fp8moe.train.run_lock import release


def test_a_fresh_run_needs_an_empty_directory(tmp_path: Path) -> None:
    made = make_run_dir(str(tmp_path / "a" / "b"), "name", "none")
    assert made == tmp_path / "a" / "b" and (made / "logs").is_dir()
    make_run_dir(str(made), "name", "none")  # logs of a start that failed are no run
    (made / "metrics.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match="holds 1 entries and a fresh run needs an empty directory: use resume=auto"):
        make_run_dir(str(made), "name", "none")
    assert make_run_dir(str(made), "name", "auto") == made
    assert (made / "metrics.jsonl").read_text() == "kept"
    (tmp_path / "home" / "mine").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"/home holds 1 entries and .* needs an empty directory: use another run_dir$"
    ):
        make_run_dir(str(tmp_path / "home"), "name", "none")  # there is no run to go on with


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
    with pytest.raises(ConfigError, match=rf"run_dir=.*/x/y lies below {tmp_path}/file, which is a file: use another"):
        check_run_dir(str(tmp_path / "file" / "x" / "y"), "none")
    with pytest.raises(ConfigError, match="run_dir is not set: add run_dir=PATH"):
        check_run_dir(None, "auto")


def test_default_names_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    made = [make_run_dir(None, "name", "none") for _ in range(3)]
    assert [path.as_posix() for path in made] == [f"runs/20260101-000000-name{end}" for end in ("", "-2", "-3")]


def test_a_fourth_start_without_a_new_step_is_refused(tmp_path: Path) -> None:
    def reach(step: int) -> None:
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n{{"st')

    for _ in range(3):
        count_start(tmp_path, refuse=True)
    with pytest.raises(ConfigError, match=r"was started 3 times since it last made a new step, step 0: .* delete .*st"):
        claim(tmp_path, "auto")
    assert not (tmp_path / "lock").exists()
    count_start(tmp_path, refuse=False)  # a fresh run, which no script starts again
    reach(5)
    for _ in range(3):  # the first of them finds new steps
        count_start(tmp_path, refuse=True)
        reach(3)  # resumed before the last step: none is new
    for _ in range(5):  # preempted: not counted
        mark_preempted(tmp_path, "stopped")
        count_start(tmp_path, refuse=True)
        assert not (tmp_path / "preempted").exists()
    with pytest.raises(ConfigError, match="new step, step 5"):
        count_start(tmp_path, refuse=True)
    reach(6)
    claim(tmp_path, "auto")
    assert (tmp_path / "lock").exists()
    release(tmp_path)
    check_run_dir(str(tmp_path), "auto")
