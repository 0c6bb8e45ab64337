"""Threads of one process: as many as cores are free, the user's OMP_NUM_THREADS first, set before torch loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8moe.cli import threads
from fp8moe.cli.threads import busy_cores, choose_threads, quota, usable_cores

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("machine", "usable", "busy", "chosen"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.4, 2),  # a browser
        (2, 2, 0.6, 1),
        (2, 2, 4.0, 1),  # never below one
        (8, 8, 4.0, 4),
        (64, 2, 30.0, 2),  # a container of two cores on a machine that others use
        (64, 2, 64.0, 1),
    ],
)
def test_as_many_threads_as_cores_are_free(
    machine: int, usable: int, busy: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(threads, "usable_cores", lambda: usable)
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    environ = {"OTHER": "1"}
    said = choose_threads(environ)
    assert environ == {"OTHER": "1", "OMP_NUM_THREADS": str(chosen)}
    assert (said is None) == (chosen == usable)
    if said:
        assert said.startswith(f"computes on {chosen} thread") and f"OMP_NUM_THREADS={usable}" in said
        assert f"keep {busy:.1f} of the machine's {machine} busy" in said and "\n" not in said


def test_what_the_user_set_stays() -> None:
    environ = {"OMP_NUM_THREADS": "7"}
    assert choose_threads(environ) is None and environ == {"OMP_NUM_THREADS": "7"}


def test_the_quota_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "CFS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert quota() == float("inf") and usable_cores() == 6  # no control groups
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert quota() == float("inf")
    (tmp_path / "cpu.cfs_quota_us").write_text("150000\n")
    assert quota() == 1.5 and usable_cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota() == float("inf")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert quota() == 0.5 and usable_cores() == 1
    (tmp_path / "cpu.max").write_text("800000 100000\n")
    assert usable_cores() == 6  # no more than the affinity


def test_busy_cores_are_the_smaller_of_mean_load_and_running_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "APART", 0.0)
    monkeypatch.setattr(threads, "LOADAVG", tmp_path / "loadavg")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    assert busy_cores() == 3.5  # no /proc
    (tmp_path / "loadavg").write_text("3.50 0.00 0.00 1/140 26304\n")
    assert busy_cores() == 0  # what made the load has ended; this process itself runs
    (tmp_path / "loadavg").write_text("3.50 0.00 0.00 10/140 26304\n")
    assert busy_cores() == 3.5  # a moment's
    (tmp_path / "loadavg").write_text("nothing\n")
    assert busy_cores() == 3.5

    def none() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", none)
    assert busy_cores() == 0.0


def test_both_are_set_before_torch_is_loaded() -> None:
    """In a process without them: torch has the threads that were chosen, and waiting threads sleep."""
    code = (
        "import os, sys\n"
        "import fp8moe.__main__\n"
        "from fp8moe.cli import threads, train\n"
        "threads.usable_cores = lambda: 3\n"
        "threads.busy_cores = lambda: os.cpu_count() - 1\n"
        "assert 'torch' not in sys.modules\n"
        "try: train._run(train.Command('train', train.command_parser), ['steps=0'])\n"
        "except ValueError: pass\n"
        "import torch\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'], torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "MKL"))}
    for given, printed in (({}, "passive 1 1"), ({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"}, "active 2 2")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONPATH": str(ROOT)} | given,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == printed, done.stderr
