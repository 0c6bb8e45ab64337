"""In which order the tiles of an output are computed."""

import triton
import triton.language as tl


@triton.jit
def tile_order(program, num_m, num_n, GROUP: tl.constexpr):
    """(m, n) of a tile: GROUP rows of tiles are swept together, so that their operands stay in L2."""
    width = GROUP * num_n
    first = program // width * GROUP
    height = tl.minimum(num_m - first, GROUP)
    inside = program % width
    return first + inside % height, inside // height
