"""Which group of rows a row belongs to, found on the device: ends of groups at or before it are counted."""

import triton
import triton.language as tl

from fp8moe.kernels.fp8 import next_power_of_2


def group_width(num_groups: int) -> int:
    """WIDTH of `group_of`."""
    return next_power_of_2(num_groups)


@triton.jit
def group_of(offsets, m, E: tl.constexpr, WIDTH: tl.constexpr):
    """The group of row m, one number, by `offsets` int32 [E + 1]; E past the last group."""
    index = tl.arange(0, WIDTH)
    ends = tl.load(offsets + 1 + index, mask=index < E, other=0x7FFFFFFF)
    return tl.sum((ends <= m).to(tl.int32), axis=0)


@triton.jit
def groups_of(offsets, m, E: tl.constexpr, WIDTH: tl.constexpr):
    """The same for rows m [BLOCK_M]."""
    index = tl.arange(0, WIDTH)
    ends = tl.load(offsets + 1 + index, mask=index < E, other=0x7FFFFFFF)
    return tl.sum((ends[None, :] <= m[:, None]).to(tl.int32), axis=1)
