"""Global memory and a CTA's shared memory: bytes, what of them exists, and who may look at them.

Global memory holds each tensor's storage between guard zones; an access to a guard zone or past the end is a fault, as
is a misaligned one. CTAs run one after the other, so nothing watches the order of global accesses.

Shared memory hands every access to `order`, which knows who wrote a byte and whether the reader may count on it. Its
granule is the narrowest ordinary store of the program: one stamp a byte only where bytes are stored one by one.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.counts import Counts
from tests.ptx.order import Clocks, Stamps
from tests.ptx.registers import UNSIGNED, Fault

BASE = 1 << 32  # a 32-bit slip in an address is seen
GUARD = 4096
ALIGNMENT = 256


class Global:
    """Storages by address."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.starts: list[int] = []
        self.used = GUARD

    def place(self, raw: np.ndarray) -> int:
        """Give bytes an address; they are copied when the first access comes."""
        start = self.used
        self.parts.append(raw)
        self.starts.append(start)
        self.used = -(-(start + raw.size + GUARD) // ALIGNMENT) * ALIGNMENT
        return BASE + start

    def seal(self) -> None:
        """Everything is placed: lay it out."""
        self.bytes, self.exists = np.zeros(self.used, np.uint8), np.zeros(self.used, bool)
        for start, raw in zip(self.starts, self.parts, strict=True):
            self.bytes[start : start + raw.size], self.exists[start : start + raw.size] = raw, True
        self.views = {size: self.bytes.view(UNSIGNED[8 * size]) for size in (1, 2, 4, 8)}

    def bring_back(self) -> None:
        """Copy every storage's bytes back to where they came from."""
        for start, raw in zip(self.starts, self.parts, strict=True):
            raw[:] = self.bytes[start : start + raw.size]

    def cells(self, address: np.ndarray, size: int, width: int) -> np.ndarray:
        """Indices of `width` elements of `size` bytes at each address, checked."""
        offset = address - BASE
        if (offset % (size * width)).any():
            raise Fault(f"misaligned access to global memory, {size * width} bytes at {address[0]:#x}")
        last = offset + (size * width - 1)
        if (offset < 0).any() or (last >= self.used).any() or not (self.exists[offset] & self.exists[last]).all():
            raise Fault("access to global memory out of the bounds of every tensor")
        return (offset // size)[:, None] + np.arange(width)

    def read(self, address: np.ndarray, size: int, width: int) -> np.ndarray:
        """[lanes, width] elements of `size` bytes."""
        return self.views[size][self.cells(address, size, width)]

    def write(self, address: np.ndarray, values: np.ndarray) -> None:
        """values [lanes, width]."""
        size, width = values.dtype.itemsize, values.shape[1]
        self.views[size][self.cells(address, size, width)] = values


class Shared:
    """One CTA's shared memory of `size` bytes; `rank` is the CTA's number in its cluster."""

    def __init__(self, clocks: Clocks, size: int, granule: int, first_warp: int, counts: Counts) -> None:
        size = -(-max(size, 16) // 16) * 16
        self.size, self.granule, self.counts = size, granule, counts
        self.bytes = np.full(size, 0xA5, np.uint8)
        self.views = {n: self.bytes.view(UNSIGNED[8 * n]) for n in (1, 2, 4, 8)}
        self.stamps, self.first_warp = Stamps(clocks, size // granule, granule), first_warp

    def check(self, address: np.ndarray, total: int) -> None:
        if (address % total).any():
            raise Fault(f"misaligned access to shared memory, {total} bytes at {int(address[0])}")
        if (address < 0).any() or (address + total > self.size).any():
            raise Fault(f"access to shared memory at {int(address.max())}, beyond the {self.size} bytes of this CTA")

    def granules(self, address: np.ndarray, total: int) -> np.ndarray:
        """[lanes, n] the granules of `total` bytes at each address."""
        return (address // self.granule)[:, None] + np.arange(max(1, total // self.granule))

    def read(self, warps: np.ndarray, address: np.ndarray, size: int, width: int) -> np.ndarray:
        """[lanes, width] elements; an ordinary read by `warps`, one a lane."""
        self.check(address, size * width)
        self.stamps.read(warps + self.first_warp, self.granules(address, size * width))
        return self.views[size][(address // size)[:, None] + np.arange(width)]

    def write(self, warps: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """An ordinary write of values [lanes, width]."""
        size, width = values.dtype.itemsize, values.shape[1]
        self.check(address, size * width)
        where, view = (address // size)[:, None] + np.arange(width), self.views[size]
        before = view[where]
        view[where] = values
        if (view[where] != values).any():
            raise Fault("two lanes write different values to one place of shared memory at once")
        same = (before == values).all(1)
        self.stamps.write(warps + self.first_warp, self.granules(address, size * width), same)
