"""Programs that misbehave end within a second or two, and leave nothing: no process, no file, no harm."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8moe.post.verify.code import last_block
from fp8moe.post.verify.registry import verifier
from fp8moe.post.verify.sandbox import ALL_LIMITS, Limits, Ran, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filters are Linux's")
SLACK = 5.0  # seconds beyond a program's own in which a busy machine starts and ends an interpreter


@pytest.fixture(autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Working directories of programs are made in a folder of the test's own, and gone afterwards."""
    here = tmp_path_factory.mktemp("programs")
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    yield
    assert list(here.iterdir()) == []


def ran(program: str, tests: str = "", **limits: int | float) -> Ran:
    before = time.monotonic()
    bounds = Limits(**{"seconds": 1.0, "memory_mb": 256} | limits)  # type: ignore[arg-type]
    found = run_program(program, tests, bounds)
    assert time.monotonic() - before < bounds.seconds + SLACK
    return found


def test_right_wrong_and_broken_programs() -> None:
    program = "def add(a, b):\n    return a + b\n"
    right = ran(program, "assert add(2, 2) == 4")
    assert right.passed and right.reason == "" and set(right.limits) <= set(ALL_LIMITS)
    assert {"cpu", "memory", "file size", "open files"} <= set(right.limits)
    wrong = ran(program, "assert add(2, 2) == 4\nassert add(2, 2) == 5, 'five'")
    assert not wrong.passed and wrong.reason == "AssertionError: five in the tests, line 2"
    assert "SyntaxError" in ran("def add(").reason
    assert ran("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1", "assert A().x == 1").passed
    assert ran("if __name__ == '__main__':\n    input()").passed
    assert "EOFError" in ran("input()").reason
    assert ran("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").passed
    assert ran("open('x', 'w').write('y')\nassert open('x').read() == 'y'\nopen('/dev/null', 'w').write('z')").passed


def test_a_program_that_ends_itself_has_not_passed() -> None:
    for program in ("import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise SystemExit", "import os\nos.abort()"):
        assert not ran(program, "assert False").passed
    assert "exit code 0 before its tests" in ran("import os\nos._exit(0)").reason


def test_endless_loops_and_sleeps() -> None:
    assert ran("while True: pass", seconds=0.5).reason == "it ran longer than 0.5 s"
    assert ran("import time\ntime.sleep(100)", seconds=0.5).reason == "it ran longer than 0.5 s"
    assert ran("while True: pass", seconds=30.0, cpu_seconds=1).reason == "it used more than 1 s of CPU"
    hidden = (
        "import signal\nfor s in (signal.SIGTERM, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    )
    assert not ran(hidden, seconds=0.5).passed


def test_fork_bombs() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not ran(bomb, seconds=0.5).passed
    for program in (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
    ):
        assert "processes" not in ran("").limits or not ran(f"{program}\nassert False").passed
    if "processes" in ran("").limits:
        assert "PermissionError" in ran("import os\nos.fork()").reason
        assert "PermissionError" in ran("import subprocess\nsubprocess.run(['true'])").reason
    detached = ran(
        "import os, time\nprint(os.getpid(), flush=True)\nif os.fork() == 0:\n    os.setsid()\n"
        "    print(os.getpid(), flush=True)\n    time.sleep(60)\ntime.sleep(0.5)"
    )
    assert not detached.passed and detached.output
    time.sleep(0.1)
    assert not [pid for pid in detached.output.split() if Path(f"/proc/{pid}").exists()]


def test_memory_hogs() -> None:
    assert ran("x = [0] * 10**9").reason == "MemoryError in the program"
    assert ran("x = []\nwhile True: x.append(bytearray(10**6))", seconds=2.0).reason == "MemoryError in the program"
    threads = "import threading, time\nfor i in range(10**4): threading.Thread(target=time.sleep, args=(99,)).start()"
    assert "can't start new thread" in ran(threads).reason


def test_huge_output_and_files() -> None:
    loud = ran("while True: print('x' * 1000)", output_kb=10)
    assert loud.reason == "it wrote more than 10 kB of output" and len(loud.output) == 10 << 10
    assert "File too large" in ran("f = open('a', 'wb')\nwhile True: f.write(bytes(10**6))", file_mb=2).reason
    many = "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(10**6))\n    i += 1"
    assert ran(many, file_mb=4).reason.startswith("its files have more than 4 MB")


def test_files_signals_and_network_outside_are_out_of_reach(tmp_path: Path) -> None:
    if set(ran("").limits) != set(ALL_LIMITS):
        pytest.skip("this kernel has not all filters")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for act in (
        "os.remove(P)",
        "open(P, 'w')",
        "open(P, 'a')",
        "os.truncate(P, 0)",
        "os.rename(P, 'x')",
        "os.mkdir(P + '2')",
    ):
        assert "Error" in ran(f"import os\nP = {str(kept)!r}\n{act}").reason, act
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [kept]
    assert "PermissionError" in ran("import socket\nsocket.socket()").reason
    # Signal 0 does nothing: were it not refused, no process of this machine would be harmed.
    for act in (
        f"os.kill({os.getpid()}, 0)",
        "os.kill(os.getppid(), 0)",
        "os.killpg(0, 0)",
        "os.kill(-1, 0)",
        "os.setsid()",
    ):
        assert "PermissionError" in ran(f"import os\n{act}").reason, act
    assert "SIGTERM" in ran("import os\nos.kill(os.getpid(), 15)").reason, "itself it may"
    limit = f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (3, 3))"
    assert "PermissionError" in ran(limit).reason


def test_nothing_of_this_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hush")
    seen = "import os\nassert not set(os.environ) - {'LC_CTYPE'}, dict(os.environ)\nassert os.listdir('.') == []"
    assert ran(seen).passed
    assert ran("import os\nassert os.getcwd() != '/' and 'fp8moe-code-' in os.getcwd()").passed
    assert ran("import sys\nassert not {'fp8moe', 'torch'} & set(sys.modules)").passed


def test_the_token_is_needed() -> None:
    forged = 'import os\nfor fd in range(3, 20):\n    try: os.write(fd, b\'{"token": "0"}\\n\')\n'
    forged += "    except OSError: pass\nos._exit(0)"
    assert not ran(forged).passed


def test_the_last_python_block_is_taken() -> None:
    text = "```\nx\n```\ntext\n```python\na = 1\n```\n```py\nb = 2\n```\n```bash\nls\n```"
    assert last_block(text) == "b = 2\n"
    assert last_block("```\nx\n```\n```text\ny\n```") == "x\n" and last_block("```python\ncut") is None


def test_verdicts() -> None:
    code = verifier("code:seconds=1,memory_mb=256")
    row = {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}
    assert code("```python\ndef f(x): return x + 1\n```", row).ok
    assert code("```python\ndef f(x): return 2\n```", row).reason == "AssertionError in the tests, line 2"
    assert code("f = 1", row).reason == "it has no fenced Python block"
    assert code("```python\nx\n```", {}).raised
