"""What is set for CUDA before torch is loaded, and what the user's own setting is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8moe.cuda_environment import ALLOCATOR, ALLOCATOR_BEFORE, QUEUES, few_queues
from fp8moe.train.opening import messages_beside_compute

ROOT = Path(__file__).parents[2]
NAMES = (QUEUES, ALLOCATOR, ALLOCATOR_BEFORE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["32", "expandable_segments:True", "None"]),
        ({QUEUES: "1", ALLOCATOR: "backend:native"}, ["1", "backend:native", "None"]),
        ({ALLOCATOR_BEFORE: "max_split_size_mb:512"}, ["32", "None", "max_split_size_mb:512"]),
    ],
)
def test_what_the_user_set_stays(given: dict[str, str], expected: list[str]) -> None:
    """In a process of its own, as every command starts: before torch is loaded."""
    code = f"import os, sys, fp8moe.__main__\nassert 'torch' not in sys.modules\nprint(*map(os.environ.get, {NAMES!r}))"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == expected, done.stderr


GIVEN = [(None, False), ("32", False), ("8", False), ("7", True), ("1", True), ("x", True)]


@pytest.mark.parametrize(("given", "few"), GIVEN)
def test_too_few_queues_are_named(given: str | None, few: bool) -> None:
    said = few_queues({} if given is None else {QUEUES: given})
    assert (said is not None) == few and (said is None or f"{QUEUES}={given} " in said)


def test_a_run_on_several_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUEUES, "1")

    def told(device: str, processes: int) -> str | None:
        run: Any = SimpleNamespace(device=torch.device(device), mesh=SimpleNamespace(world_size=processes))
        return messages_beside_compute(run)

    assert str(told("cuda", 2)).startswith(f"{QUEUES}=1 has") and told("cuda", 1) is told("cpu", 2) is None
    monkeypatch.setenv(QUEUES, "32")
    assert told("cuda", 2) is None
