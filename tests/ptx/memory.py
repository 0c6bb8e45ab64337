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
NUMBERS = np.arange(16)


def views(raw: np.ndarray) -> dict[int, np.ndarray]:
    """Bytes as elements of 1 to 16 bytes; 16 are two numbers that only ever move together."""
    return {size: raw.view(UNSIGNED[8 * size] if size <= 8 else np.complex128) for size in (1, 2, 4, 8, 16)}


def limits(address: np.ndarray) -> tuple[int, int, int]:
    """The least and the largest address, and the bits of all."""
    found = (np.minimum.reduce(address), np.maximum.reduce(address), np.bitwise_or.reduce(address))
    return int(found[0]), int(found[1]), int(found[2])


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
        self.views = views(self.bytes)

    def bring_back(self) -> None:
        """Copy every storage's bytes back to where they came from."""
        for start, raw in zip(self.starts, self.parts, strict=True):
            raw[:] = self.bytes[start : start + raw.size]

    def cells(self, address: np.ndarray, total: int) -> np.ndarray:
        """Indices of the `total` bytes at each address, in units of as many, checked."""
        if not address.size:
            return address
        first, last, bits = limits(address)
        if bits & (total - 1):
            raise Fault(f"misaligned access to global memory, {total} bytes at {address[0]:#x}")
        offset = address - BASE
        # Storages begin at multiples of ALIGNMENT: an aligned access that ends in one begins there.
        if (
            first < BASE
            or last + total > BASE + self.used
            or (np.count_nonzero(self.exists.take(offset + (total - 1))) != address.size)
        ):
            raise Fault("access to global memory out of the bounds of every tensor")
        return offset // total

    def read(self, address: np.ndarray, size: int, width: int) -> np.ndarray:
        """[lanes, width] elements of `size` bytes."""
        found = self.views[size * width].take(self.cells(address, size * width))
        return found.view(UNSIGNED[8 * size]).reshape(-1, width)

    def write(self, address: np.ndarray, values: np.ndarray) -> None:
        """values [lanes, width]."""
        view = self.views[values.dtype.itemsize * values.shape[1]]
        view[self.cells(address, view.itemsize)] = np.ascontiguousarray(values).view(view.dtype)[:, 0]


class Shared:
    """One CTA's shared memory of `size` bytes; `rank` is the CTA's number in its cluster."""

    def __init__(self, clocks: Clocks, size: int, granule: int, first_warp: int, counts: Counts) -> None:
        size = -(-max(size, 16) // 16) * 16
        self.size, self.granule, self.counts = size, granule, counts
        self.bytes = np.full(size, 0xA5, np.uint8)
        self.views = views(self.bytes)
        self.stamps, self.first_warp = Stamps(clocks, size // granule, granule), first_warp

    def check(self, address: np.ndarray, total: int) -> tuple[int, int]:
        """The first and the last granule of an access that may be, of `total` bytes at each address."""
        if not address.size:
            return 0, 0
        first, last, bits = limits(address)
        if bits & (total - 1):
            raise Fault(f"misaligned access to shared memory, {total} bytes at {int(address[0])}")
        if first < 0 or last + total > self.size:
            raise Fault(f"access to shared memory at {int(address.max())}, beyond the {self.size} bytes of this CTA")
        return first // self.granule, (last + total - 1) // self.granule

    def granules(self, address: np.ndarray, total: int) -> np.ndarray:
        """[lanes, n] the granules of `total` bytes at each address."""
        return (address // self.granule)[:, None] + NUMBERS[: max(1, total // self.granule)]

    def read(self, warps: np.ndarray, address: np.ndarray, size: int, width: int) -> np.ndarray:
        """[lanes, width] elements; an ordinary read by `warps`, one a lane."""
        within = self.check(address, size * width)
        self.stamps.read(warps + self.first_warp, self.granules(address, size * width), within)
        view = self.views[size * width]
        return view.take(address // view.itemsize).view(UNSIGNED[8 * size]).reshape(-1, width)

    def write(self, warps: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """An ordinary write of values [lanes, width], of all or, where that is a fault, of none."""
        size, width = values.dtype.itemsize, values.shape[1]
        self.check(address, size * width)
        view = self.views[size * width]
        where, packed = address // view.itemsize, np.ascontiguousarray(values).view(view.dtype)[:, 0]
        before = view.take(where)
        view[where] = packed
        try:
            if np.count_nonzero(view.take(where).view(values.dtype) != packed.view(values.dtype)):
                raise Fault("two lanes write different values to one place of shared memory at once")
            self.stamps.write(
                warps + self.first_warp,
                self.granules(address, size * width),
                lambda: (before.view(values.dtype).reshape(values.shape) == values).all(1),
            )
        except Fault:
            view[where] = before
            raise
