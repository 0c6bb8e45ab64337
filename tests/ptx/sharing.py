"""The suite's work in parts, and two processes that take one part after the other.

Cases of one op and kind share kernels, and planted faults are faults of those kernels, so they stay together: a process
reads and compiles a program once. Nothing else passes from one case to the next, each draws from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

PROCESSES = 2
BACKENDS = ("gluon", "triton")
SECTIONS = ("cases", "plants", "sums", "layers")


@dataclass
class Part:
    """Names of cases, cases in which faults are planted, back ends whose sums and kinds whose layer are run."""

    cases: list[str] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)


def parts(cases: Iterable[str], planted: Iterable[str], sums: Iterable[str], layers: Iterable[str]) -> list[Part]:
    """What takes long first: a layer, then products, which come last among the cases."""
    found: dict[str, Part] = {}
    for name in cases:
        found.setdefault(_shared(name), Part()).cases.append(name)
    for name in planted:
        found.setdefault(_shared(name), Part()).planted.append(name)
    of_layers, of_sums = [Part(layers=[kind]) for kind in layers], [Part(sums=[backend]) for backend in sums]
    return [*of_layers, *sorted(found.values(), key=lambda part: -len(part.cases) - len(part.planted)), *of_sums]


def _shared(name: str) -> str:
    """Back end, op and kind, which cases with the same kernels have in common."""
    return " ".join(name.split()[:3])


def perform(work: Callable[[Part], dict[str, Any]], of: list[Part], processes: int) -> dict[str, dict[str, Any]]:
    """What `work` gives for all parts, put together by section."""
    together: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for found in _results(work, of, min(processes, len(of))):
        for section, results in found.items():
            together[section] |= results
    return {section: dict(sorted(results.items())) for section, results in together.items()}


def _results(work: Callable[[Part], dict[str, Any]], of: list[Part], processes: int) -> Iterator[dict[str, Any]]:
    if processes < 2:
        yield from map(work, of)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:  # modules are loaded once
        for done in as_completed([pool.submit(work, part) for part in of]):
            yield done.result()
