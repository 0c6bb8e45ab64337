"""A Python program and its tests run in a process with limits: what they are, and what they are not.

The process has a group of its own, a temporary working directory, an empty environment, no stdin, and the limits of
`Limits`; at its wall-clock time, at too much output or too many bytes in its folder the whole group is killed. It never
has a chance to fork where the kernel takes `post.verify.confined`'s filter, so nothing of it is left.

These are limits for the mistakes of a model, endless loops and deleted folders, and no security boundary: the program
shares the kernel and reads whatever the user may read. Programs of an enemy belong in a virtual machine. Where a limit
does not exist (`Ran.limits` names those in force; macOS has neither filter), it is said once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fp8moe.limits import Range, check_fields

ALL_LIMITS = ("cpu", "memory", "file size", "open files", "writes", "processes", "network")
_SCRIPT = Path(__file__).with_name("confined.py")
_LOOK = 0.05  # seconds between looks at the folder
_FILES, _OPEN_FILES, _MOST_ANSWER = 1000, 64, 1 << 16
_STARTS = 10.0  # seconds beyond the program's own that an interpreter may take to start on a busy machine


@dataclass(frozen=True)
class Limits:
    """seconds: wall clock of program and tests. cpu_seconds: of all its threads. memory_mb: address space. file_mb: of
    a file, and of all in its folder. output_kb: of stdout and stderr together."""

    seconds: float = 5.0
    cpu_seconds: int = 5
    memory_mb: int = 1024
    file_mb: int = 8
    output_kb: int = 64

    def __post_init__(self) -> None:
        check_fields(
            self,
            "code",
            seconds=Range(above=0, most=3600, use="use 5"),
            cpu_seconds=Range(least=1, most=3600),
            memory_mb=Range(least=64, most=2**20),
            file_mb=Range(least=1, most=2**20),
            output_kb=Range(least=1, most=2**20),
        )


@dataclass(frozen=True)
class Ran:
    """passed: program and tests ran to their ends. reason: why not. output: its first bytes. limits: those in force."""

    passed: bool
    reason: str
    output: str
    limits: tuple[str, ...]


def run_program(program: str, tests: str, limits: Limits) -> Ran:
    """Run `program`, then `tests` in the same namespace. Always returns within the limits, about; raises OSError if no
    process can be started."""
    token = secrets.token_hex(16)
    job = {
        "program": program,
        "tests": tests,
        "token": token,
        "limits": {
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory_mb << 20,
            "file_size": limits.file_mb << 20,
            "open_files": _OPEN_FILES,
        },
    }
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryDirectory(prefix="fp8moe-code-", ignore_cleanup_errors=True) as folder,
    ):
        given.write(json.dumps(job).encode("utf-8", "surrogatepass"))
        given.seek(0)
        answers, answer = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_SCRIPT), str(answer)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={},
                start_new_session=True,
                pass_fds=(answer,),
            )
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(answer)
        with process, os.fdopen(answers, "rb", buffering=0):
            watched = _Watched(process, answers, folder, limits)
            try:
                watched.watch()
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return watched.result(token)


@dataclass
class _Watched:
    """A running program: its output and answers so far, and why it was stopped."""

    process: subprocess.Popen[bytes]
    answers: int
    folder: str
    limits: Limits
    output: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    stopped: str = ""

    def watch(self) -> None:
        """Until it has ended or must be stopped."""
        assert self.process.stdout is not None
        started, deadline = False, time.monotonic() + self.limits.seconds + _STARTS
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ, self.output)
            selector.register(self.answers, selectors.EVENT_READ, self.answer)
            while not self.stopped:
                for key, _ in selector.select(_LOOK):
                    if self._read(key.fd, key.data):
                        continue
                    selector.unregister(key.fileobj)
                    if key.fd == self.answers:  # it has ended, or closed what only its end should close
                        self._drain()
                        return
                if not started and b"\n" in self.answer:
                    started, deadline = True, time.monotonic() + self.limits.seconds
                if self.answer.count(b"\n") > 1:
                    self._drain()
                    return
                self._look(deadline)

    def _read(self, descriptor: int, into: bytearray) -> bool:
        """Take what is there; False at the end."""
        found = os.read(descriptor, 1 << 16)
        into += found
        return bool(found)

    def _look(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.stopped = f"it ran longer than {self.limits.seconds:g} s"
        elif len(self.output) > self.limits.output_kb << 10:
            self.stopped = f"it wrote more than {self.limits.output_kb} kB of output"
        elif len(self.answer) > _MOST_ANSWER:
            self.stopped = "it wrote where only its end is told"
        elif _size(self.folder) > self.limits.file_mb << 20:
            self.stopped = f"its files have more than {self.limits.file_mb} MB, or are more than {_FILES}"

    def _drain(self) -> None:
        """What it wrote last; a moment for its exit code."""
        assert self.process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0.5)
        os.set_blocking(self.process.stdout.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while len(self.output) <= self.limits.output_kb << 10 and self._read(
                self.process.stdout.fileno(), self.output
            ):
                continue

    def result(self, token: str) -> Ran:
        """What came of it."""
        lines = []
        for line in bytes(self.answer).splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        force = tuple(lines[0].get("limits", ())) if lines and isinstance(lines[0], dict) else ()
        output = bytes(self.output[: self.limits.output_kb << 10]).decode(errors="replace")
        last = lines[-1] if len(lines) > 1 and isinstance(lines[-1], dict) else {}
        passed = not self.stopped and last.get("token") == token
        reason = "" if passed else self.stopped or str(last.get("error") or self._ended(output))
        return Ran(passed, reason, output, force)

    def _ended(self, output: str) -> str:
        code = self.process.returncode
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"it used more than {self.limits.cpu_seconds} s of CPU"
        last = output.strip().splitlines()[-1:]
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} before its tests"
        return f"it {how}" + (f": {last[0][:200]}" if last else "")


def _size(folder: str) -> int:
    """Bytes of the files below a folder; more than any limit where they are too many."""
    total = count = 0
    for here, inner, names in os.walk(folder):
        count += len(inner) + len(names)
        if count > _FILES:
            return 1 << 62
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_size
    return total
