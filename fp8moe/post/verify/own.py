"""A user's verifier, in a process of its own for every thread that asks it (`post.function_process`).

One that hangs, ends its process or crashes takes its sample with it and no other: the sample is excluded, named and
counted, as where a verifier raises. A call costs about 0.1 ms. What the module of the function imports is imported in
each of the processes, which end with their threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fp8moe.post.function_process import FunctionProcess
from fp8moe.post.verify.verdict import Verdict

WAIT = 60.0  # seconds that are waited at once


class OwnVerifier:
    """A function `module:function` of (text, row) and of options. timeout: seconds of a call; None: no bound."""

    def __init__(self, name: str, options: Mapping[str, Any], timeout: float | None) -> None:
        """Raises ConfigError where it can't be imported."""
        self._name, self._options, self._timeout = name, options, timeout
        self._of_thread = threading.local()
        self._process()

    def __call__(self, text: str, row: Mapping[str, Any]) -> Verdict:
        """Its verdict; where it gives none, one with `raised`."""
        process = self._process()
        process.begin([(text, row, self._options)])
        while not process.run(WAIT):
            pass
        (found,) = process.found[0]
        return Verdict(*found) if isinstance(found, list) else Verdict(False, str(found), raised=True)

    def _process(self) -> FunctionProcess:
        """That of the thread."""
        if not hasattr(self._of_thread, "process"):
            self._of_thread.process = FunctionProcess("verifier", [self._name], self._timeout)
        process: FunctionProcess = self._of_thread.process
        return process
