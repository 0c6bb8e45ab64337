"""Speeds that kernels were measured at: the records that `benchmarks/results` commits, by card.

They ship with the package (`fp8moe/plan/records` is a symlink to that folder). A file `NAME-h100.json` holds records of
an H100; a later file in alphabetical order replaces an earlier one's record of the same kernel and size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

RECORDS = Path(__file__).resolve().parent / "records"


@functools.cache
def records(card: str) -> tuple[dict[str, Any], ...]:
    """Every record of a card ("H100"), files in alphabetical order; none for a card that nobody measured."""
    paths = sorted(RECORDS.glob(f"*-{card.lower()}.json"))
    return tuple(record for path in paths for record in json.loads(path.read_text()))


@functools.cache
def throughputs(card: str, candidate: str) -> Mapping[str, float]:
    """ "op label" -> TFLOPS of the kernels of `candidate` ("gluon", "bf16 cublas"), as measured on `card`."""
    found = {}
    for record in records(card):
        op, _, name = record["name"].partition(" ")
        if record["metric"] == "throughput" and name == candidate:
            found[f"{op} {record['shape']}"] = record["value"]
    return MappingProxyType(found)
