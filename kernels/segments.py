"""Segments: which values of a flat buffer an update touches, and which of them decay.

Parameters of all sizes lie end to end in a flat buffer, so one launch updates them all. A device back end gives each
program one part: values of one segment within one aligned run of PART values. So the decay is one number a program,
only the parts at a segment's ends need masks, and the table costs 24 bytes for PART values. A flag for each value was
refused (a byte more for each of 22), as was padding every parameter to whole runs: shards of the buffer may begin and
end anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div

PART = 4096  # values that a program updates


@dataclass(frozen=True)
class Segments:
    """Spans of a flat buffer and, made of them, what each program of a device updates.

    spans: (start, stop, whether it decays) each, ascending; values between them are left alone. parts: int64 [P, 3],
    the same numbers for each part, on the buffer's device.
    """

    spans: tuple[tuple[int, int, bool], ...]
    parts: Tensor

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int, bool]], device: torch.device | str) -> "Segments":
        """Segments of these spans, empty ones left out. Raises ValueError unless they ascend from 0 without overlap."""
        kept = tuple(span for span in spans if span[0] != span[1])
        end = 0
        for start, stop, _ in kept:
            if start < end or stop < start:
                raise ValueError(
                    f"spans must ascend without overlap, and [{start}, {stop}) follows {end}: sort them by start"
                )
            end = stop
        return cls(kept, _parts(kept).to(device))

    @property
    def end(self) -> int:
        """Values that the flat buffer must have at least."""
        return self.spans[-1][1] if self.spans else 0

    def within(self, start: int, stop: int) -> "Segments":
        """Segments of the shard [start, stop) of the buffer, counted from the shard's first value."""
        cut = ((max(a, start) - start, min(b, stop) - start, decays) for a, b, decays in self.spans)
        return Segments.of(((a, b, decays) for a, b, decays in cut if a < b), self.parts.device)


def _parts(spans: Iterable[tuple[int, int, bool]]) -> Tensor:
    """int64 [P, 3] on the CPU; spans that touch and agree share their parts."""
    joined: list[tuple[int, int, bool]] = []
    for start, stop, decays in spans:
        if joined and joined[-1][1:] == (start, decays):
            start = joined.pop()[0]
        joined.append((start, stop, decays))
    parts = [torch.empty(0, 3, dtype=torch.int64)]
    for start, stop, decays in joined:
        runs = torch.arange(start // PART, ceil_div(stop, PART)) * PART
        bounds = (runs.clamp(min=start), (runs + PART).clamp(max=stop), torch.full_like(runs, int(decays)))
        parts.append(torch.stack(bounds, 1))
    return torch.cat(parts)
