"""Completions of one set of weights, kept as they come, a line each: what was drawn is never asked for twice.

A line that was cut off by a kill is passed over, and its completion asked for again. A completion belongs to the name
of its prompt, its number, and the limits that it was drawn under.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fp8moe.generate.groups import GroupSampling, Sampled
from fp8moe.train.json_lines import read_lines

Place = tuple[int, int]  # number of the prompt, number of the sample


class KeptSamples:
    """The completions of prompts of these names in the file `path`, which is written while the block runs."""

    def __init__(self, path: Path, names: Sequence[str], sampling: GroupSampling) -> None:
        self._names, self._limits = names, [sampling.max_tokens, sampling.temperature]
        self.found: dict[Place, Sampled] = {}
        numbers = {name: number for number, name in enumerate(names)}
        for row in read_lines(path)[0]:
            number = numbers.get(str(row.get("name")))
            if number is not None and row["limits"] == self._limits and row["sample"] < sampling.samples:
                one = Sampled(tuple(row["ids"]), tuple(row["logprobs"]), row["ended"])
                self.found[number, row["sample"]] = one
        path.parent.mkdir(exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> KeptSamples:
        file = self._file
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def keep(self, place: Place, one: Sampled) -> None:
        """Write a completion; it is on the disk, or with the system, when this returns."""
        self.found[place] = one
        row = {"name": self._names[place[0]], "sample": place[1], "limits": self._limits}
        row |= {"ids": one.ids, "logprobs": one.logprobs, "ended": one.has_ended}
        self._file.write(f"{json.dumps(row)}\n".encode())
        self._file.flush()
