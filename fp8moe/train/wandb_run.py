"""A run's records at Weights & Biases, written by a process of its own (`train.wandb_process`).

Nothing here waits for a server: a step's record is written to a pipe that never blocks, and `close` waits
CLOSE_SECONDS at most. When wandb fails, in whatever way, one sentence says it once and nothing more is sent:
`metrics.jsonl` holds every step in any case. The id of wandb's run is the file `wandb-id` of the run directory, so
that a resume goes on in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8moe.data.durable import write_text

ID_FILE = "wandb-id"
FINISH_SECONDS = 8.0  # that its process gives a server for what is left when the run has ended
CLOSE_SECONDS = 10.0  # that the run waits for its process
MOST_PENDING = 4 << 20  # bytes that its process has not read, some thousand steps, before wandb is given up


def run_id(run_dir: Path) -> str:
    """The id of the run directory's wandb run: kept there, made at the first start."""
    path = run_dir / ID_FILE
    with contextlib.suppress(OSError):
        if kept := path.read_text(encoding="utf-8").strip():
            return kept
    made = uuid.uuid4().hex[:8]
    write_text(path, f"{made}\n")
    return made


class WandbRun:
    """The writer's side of the process. problem: why nothing is sent any more; "" while all is well."""

    def __init__(self, run_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        has_key = "WANDB_API_KEY" in os.environ or Path("~/.netrc").expanduser().exists()
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self.problem, self._pending, self._is_stopped = "", b"", False
        with open(run_dir / "logs" / "wandb.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fp8moe.train.wandb_process", str(FINISH_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # signals of the terminal and the launcher are the run's
            )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._send(
            {"project": project, "name": name, "dir": str(run_dir), "id": run_id(run_dir), "mode": mode}
            | {"config": dict(config)}
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the figures of a step, each by its name."""
        self._send({"record": values, "step": step})

    def forget_after(self, step: int) -> None:
        """Send nothing: wandb keeps the first record of a step, and passes over those of steps that are done again."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End wandb's run, with a summary or as failed without one, within CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        if summary is not None:
            self._send({"summary": summary})
        while self._pending and not self.problem and time.monotonic() < deadline:
            time.sleep(0.01)
            self._flush()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.problem = self.problem or f"its process did not end within {CLOSE_SECONDS:.0f} seconds"
        self._listen()
        self.stop()

    def stop(self) -> None:
        """End the process and those that wandb started, without waiting for a server; a second call does nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._listen()
        self._pending += json.dumps(message, default=str).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write what the pipe takes now, and keep the rest for the next step."""
        assert self._process.stdin is not None
        try:
            while self._pending and not self.problem:
                self._pending = self._pending[os.write(self._process.stdin.fileno(), self._pending) :]
        except BlockingIOError:
            if len(self._pending) > MOST_PENDING:
                self.problem = f"its process left {MOST_PENDING} bytes unread"
        except BrokenPipeError:
            self.problem = "its process has ended"

    def _listen(self) -> None:
        """Take what the process said, which it does where wandb has failed."""
        assert self._process.stdout is not None
        said = self._process.stdout.read() or b""
        self.problem = self.problem or said.decode(errors="replace").strip()
