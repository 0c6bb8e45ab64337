"""The host's peak memory of saving and loading, measured in a process of its own: only a background save copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MEGABYTES = 96
PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.bench_checkpoint import memory
print(json.dumps(memory(int(sys.argv[1]), Path(sys.argv[2]))))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The bounds are the benchmark's; one tensor is more than its slack."""
    command = [sys.executable, "-c", PROGRAM, str(MEGABYTES), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, (peak, bound) in grown.items() if peak > bound] == [], grown
    assert grown["background save"][0] > 0.8 * MEGABYTES * 2**20, "the measurement sees a copy where there is one"
