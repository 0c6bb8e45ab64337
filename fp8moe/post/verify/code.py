"""`code`: the last fenced Python block of a text passes the row's tests, in a process with limits.

The tests are Python too, text or a list of texts, run behind the program in its namespace: `assert add(2, 2) == 4`. The
program runs as a module of another name than `__main__`, so that what stands under `if __name__ == "__main__"`, which
would read stdin, does not run.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from fp8moe.post.verify.sandbox import ALL_LIMITS, Limits, run_program
from fp8moe.post.verify.verdict import Verdict, Verifier

_BLOCK = re.compile(r"^[ \t]*```(?P<first>[^\n]*)\n(?P<code>.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_KIND = re.compile(r"[ \t]*([\w+-]*)")
_PYTHON = ("python", "python3", "py")

_logger = logging.getLogger(__name__)
_said: set[tuple[str, ...]] = set()
_lock = threading.Lock()


def last_block(text: str) -> str | None:
    """The last fenced block that is called Python, else the last without a name; None where there is neither."""
    blocks = []
    for match in _BLOCK.finditer(text):
        kind = _KIND.match(match["first"])
        blocks.append((kind[1].lower() if kind else "", match["code"]))
    named = [block for kind, block in blocks if kind in _PYTHON] or [block for kind, block in blocks if not kind]
    return named[-1] if named else None


def code(
    *, seconds: float = 5.0, cpu_seconds: int = 5, memory_mb: int = 1024, file_mb: int = 8, output_kb: int = 64
) -> Verifier:
    """A verifier that runs the block with row["tests"] under these limits. Raises ValueError for a limit that is
    none."""
    limits = Limits(float(seconds), cpu_seconds, memory_mb, file_mb, output_kb)

    def verify(text: str, row: Mapping[str, Any]) -> Verdict:
        given = row["tests"]
        tests = given if isinstance(given, str) else "\n".join(given)
        program = last_block(text)
        if program is None:
            return Verdict(False, "it has no fenced Python block")
        ran = run_program(program, tests, limits)
        _say_missing(ran.limits)
        return Verdict(ran.passed, ran.reason)

    return verify


def _say_missing(limits: tuple[str, ...]) -> None:
    """Warn once of the limits that this platform does not have."""
    missing = tuple(name for name in ALL_LIMITS if name not in limits)
    with _lock:
        is_new = bool(limits and missing) and missing not in _said
        _said.add(missing)
    if is_new:
        _logger.warning("code runs without these limits, which this platform lacks: %s", ", ".join(missing))
