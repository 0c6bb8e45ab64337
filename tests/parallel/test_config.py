"""Limits of the parallel settings: what is accepted at the limit, and what is said just below it."""

from __future__ import annotations

import re

import pytest

from fp8moe.parallel.config import ParallelConfig


@pytest.mark.parametrize("name", ["communication_sms", "chunks", "ranks_per_node", "capacity_factor", "max_imbalance"])
def test_least_values(name: str) -> None:
    ParallelConfig(**{name: 1})
    with pytest.raises(ValueError, match=re.escape(f"parallel.{name}=0 must be at least 1: use 1 or more")):
        ParallelConfig(**{name: 0})


@pytest.mark.parametrize("name, default", [("timeout", "300.0"), ("startup_timeout", "900.0")])
def test_times_are_above_0(name: str, default: str) -> None:
    ParallelConfig(**{name: 1e-3})
    with pytest.raises(ValueError, match=re.escape(f"parallel.{name}=0 must be above 0: use {default}")):
        ParallelConfig(**{name: 0})


def test_a_fixed_size_needs_no_limit() -> None:
    ParallelConfig(capacity_factor=2.0)
    ParallelConfig(max_imbalance=2.0)
    with pytest.raises(ValueError, match=r"parallel\.capacity_factor=2\.0 already bounds .*=null, not 3\.0"):
        ParallelConfig(capacity_factor=2.0, max_imbalance=3.0)
