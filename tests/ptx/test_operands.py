"""Where operands of a warp's products lie in its registers, and what TMA copies of a tensor of any rank."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import mma
from tests.ptx.memory import BASE
from tests.ptx.tma import TensorMap, places
from tests.ptx.wgmma import fragment_of_a, sums_of

WARPS, LANES = 3, 32


def bf16(*shape: int) -> np.ndarray:
    """Random numbers that BF16 holds."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def register(of_lane: list[tuple[float, float]]) -> np.ndarray:
    """Two BF16 values of each lane, the first in the lower half."""
    halves = np.array(of_lane, np.float32).view(np.uint32) >> 16
    return (halves[:, 0] | halves[:, 1] << 16).astype(np.uint32)


def test_a_product_of_a_warp_takes_its_operands_as_the_manual_draws_them() -> None:
    """PTX ISA, fragments of m16n8k16: element i of a lane by its group and its number within."""
    a, b, c = bf16(WARPS, 16, 16), bf16(WARPS, 16, 8), bf16(WARPS, 16, 8)
    lanes = [(warp, lane >> 2, lane % 4) for warp in range(WARPS) for lane in range(LANES)]
    of_a, of_b = [], []
    for first in (0, 2, 4, 6):
        row, column = 8 * (first in (2, 6)), 8 * (first >= 4)
        at = [(warp, group + row, 2 * thread + column) for warp, group, thread in lanes]
        of_a.append(register([(a[w, r, k], a[w, r, k + 1]) for w, r, k in at]))
    for first in (0, 2):
        at = [(warp, 2 * thread + 4 * first, group) for warp, group, thread in lanes]
        of_b.append(register([(b[w, k, n], b[w, k + 1, n]) for w, k, n in at]))
    np.testing.assert_array_equal(fragment_of_a(of_a), a)
    np.testing.assert_array_equal(mma.fragment_of_b(of_b), b)
    for i, bits in enumerate(mma.registers_of(c)):
        expected = [c[warp, group + 8 * (i >= 2), 2 * thread + (i & 1)] for warp, group, thread in lanes]
        np.testing.assert_array_equal(bits.view(np.float32), expected)
    np.testing.assert_array_equal(sums_of([one.view(np.float32) for one in mma.registers_of(c)]), c)


@pytest.mark.parametrize("shape, box, at", [
    ((3, 7, 2, 24), (1, 4, 1, 16), (2, 5, 1, 16)),
    ((3, 7, 2, 24), (1, 4, 1, 32), (1, -2, 0, 0)),
    ((2, 3, 5), (2, 2, 8), (0, 1, 0)),
    ((4, 16), (2, 16), (3, 0)),
    ((40,), (16,), (32,)),
])  # fmt: skip
def test_a_box_of_any_rank_is_what_a_slice_is(
    shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...]
) -> None:
    """Zeros stand outside the tensor."""
    whole = np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)
    tensor = TensorMap(BASE, shape, whole.strides, box, 2, 0)
    inside, outer, inner, piece = places(tensor, at, 0)
    memory, tile = whole.reshape(-1).view(np.uint8), np.zeros(tensor.bytes, np.uint8)
    for is_there, source, target in zip(inside.ravel(), outer.ravel(), inner.ravel(), strict=True):
        if is_there:
            tile[target * piece : (target + 1) * piece] = memory[source * piece : (source + 1) * piece]
    padded = np.pad(whole, [(8, 40)] * len(shape))
    expected = padded[tuple(slice(8 + first, 8 + first + count) for first, count in zip(at, box, strict=True))]
    np.testing.assert_array_equal(tile.view(np.uint16).reshape(box), expected)
