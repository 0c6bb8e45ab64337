"""Values of a checkpoint of ours by ranges, in FP32, whatever layout wrote it; one range is in memory at a time."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fp8moe.errors import ConfigError, DataError
from fp8moe.train.checkpoint import Location, folder_of, problems
from fp8moe.train.checkpoint.files import read_text
from fp8moe.train.checkpoint.state import STATE_FILE
from fp8moe.train.checkpoint.storage import TensorFile, read_index


class Stored:
    """A checkpoint, verified. averaged: of weights the average in place of the masters.

    state: what its state.json holds. Raises DataError where it is damaged, ConfigError where it has no average.
    """

    def __init__(self, path: Location, *, averaged: bool = False) -> None:
        if wrong := problems(path):
            raise DataError(f"{path}: {wrong[0]}: use another checkpoint")
        self.path, self._folder = path, folder_of(path)
        self._kind = "ema." if averaged else "master."
        try:
            self.state: dict[str, Any] = json.loads(read_text(self._folder, STATE_FILE))
            self._index = read_index(self._folder)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} can't be read ({error!r}): use another checkpoint") from error
        if averaged and not any(name.startswith("ema.") for name in self._index):
            raise ConfigError(f"{path} holds no average of the weights, which --ema asks for: leave --ema out")

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Values [first, first + count) of a flattened tensor, `master.NAME` or `bias.NAME`, FP32 [count]."""
        stored = name.replace("master.", self._kind, 1) if name.startswith("master.") else name
        if stored not in self._index:
            raise DataError(f"{self.path} holds no {stored}, which its model needs: use another checkpoint")
        entry = self._index[stored]
        out = torch.full((count,), float("nan"))
        for part in entry["parts"]:
            start, length = part["offsets"][0], part["sizes"][0]
            begin, end = max(start, first), min(start + length, first + count)
            if begin < end:
                with self._folder.open(part["file"]) as handle:
                    box = [slice(begin - start, end - start)]
                    TensorFile(handle, self._folder.chunk).read_into(
                        out[begin - first : end - first], part["name"], box
                    )
        return out

    def length(self, name: str) -> int | None:
        """Values of a tensor; None where there is none of this name."""
        entry = self._index.get(name)
        return None if entry is None else int(torch.Size(entry["shape"]).numel())
