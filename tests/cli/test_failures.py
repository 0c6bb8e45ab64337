"""Exceptions to exit codes."""

from __future__ import annotations

import pytest
import torch

from fp8moe.cli.command import explain
from fp8moe.errors import ConfigError, DataError, HangError, NonFiniteError

TIMED_OUT = RuntimeError(
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for send operation "
    "to complete"
)
LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (ValueError("a"), 2),
        (DataError("a"), 3),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 4),
        (MemoryError(), 4),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), 4),
        (NonFiniteError("a"), 5),
        (HangError("a"), 6),
        (TIMED_OUT, 6),
        (KeyError("a"), 1),
        (RuntimeError("a"), 1),
    ],
)
def test_codes(error: Exception, code: int) -> None:
    failure = explain(error)
    assert failure.code == code and not failure.secondary
    assert bool(failure.traceback) == (code == 1)  # only a defect shows one
    assert failure.sentence and "\n" not in failure.sentence


def test_a_lost_peer_is_a_witness_not_a_cause() -> None:
    failure = explain(LOST)
    assert failure.secondary and failure.code == 1 and "another process ended" in failure.sentence


def test_mistakes_are_everybodys_and_accidents_one_ranks() -> None:
    assert explain(ConfigError("a")).shared and explain(DataError("a")).shared and explain(ValueError("a")).shared
    assert not explain(NonFiniteError("a")).shared and not explain(TIMED_OUT).shared


def test_several_lines_become_one() -> None:
    assert explain(ValueError("one\n  two")).sentence == "one two"
    assert "send operation" in explain(TIMED_OUT).sentence and ".cc" not in explain(TIMED_OUT).sentence
