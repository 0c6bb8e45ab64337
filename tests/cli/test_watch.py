"""`fp8moe watch` as a user starts it: on a terminal until the run ends or Ctrl-C, and once where there is none."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from tests.report.test_watch import append, run_of, step

ROOT = Path(__file__).resolve().parent.parent.parent


class Terminal:
    """A command on a terminal of its own; `text` is all that it wrote there."""

    def __init__(self, *words: str) -> None:
        self._mine, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "60"}
        command = [sys.executable, "-m", "fp8moe", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        os.set_blocking(self._mine, False)
        self.text = ""

    def until(self, holds: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds(self.text):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
            self._read()

    def ended(self) -> int:
        self.until(lambda _: self.process.poll() is not None)  # what it writes is read, or it would wait for that
        self._read()
        os.close(self._mine)
        return self.process.wait()

    def _read(self) -> None:
        try:
            while part := os.read(self._mine, 1 << 16):
                self.text += part.decode(errors="replace")
        except OSError:  # nothing more now, or its end
            pass


@pytest.fixture
def terminal(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Terminal("watch", str(run_of(tmp_path / "run")), "--interval", "0.1")
    yield made
    made.process.kill()
    made.process.wait()


def test_a_terminal_follows_the_run_to_its_end(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until(lambda text: "step 10/100" in text)
    append(tmp_path / "run" / "metrics.jsonl", step(11))
    terminal.until(lambda text: "step 11/100" in text)
    assert terminal.text.startswith("\x1b[?1049h")  # the alternate screen
    append(tmp_path / "run" / "metrics.jsonl", step(100))
    append(tmp_path / "run" / "events.jsonl", {"kind": "end", "step": 100, "text": "done"})
    (tmp_path / "run" / "lock").unlink()
    assert terminal.ended() == 0
    before, _, behind = terminal.text.rpartition("\x1b[?1049l")
    assert "step 100/100" in behind and "finished" in behind and "\x1b[?25h" in before + behind  # the cursor is back


def test_ctrl_c_leaves_cleanly(terminal: Terminal) -> None:
    terminal.until(lambda text: "step 10/100" in text)
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.ended() == 0
    behind = terminal.text.rpartition("\x1b[?1049l")[2]
    assert "step 10/100" in behind and "Traceback" not in terminal.text and "interrupted" not in terminal.text


def test_a_pipe_gets_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run_of(tmp_path / "run"))]) == 0
    text = capsys.readouterr().out
    assert text.count("step 10/100") == 1 and "\x1b" not in text and "trains" in text


def test_wrong_words_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--interval", "0"]) == 2
    assert "--interval=0 must be 0.1 to 3600 seconds: use --interval 2" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert re.search(r"none is not there: name a run's directory", capsys.readouterr().err)
    assert main(["watch", str(tmp_path)]) == 3


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    program = (
        "import sys; from fp8moe.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules and 9))"
    )
    words = ["watch", str(folder), "--once"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
