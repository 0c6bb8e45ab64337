"""Scales, codes and BF16, rounded alike on a GPU and in Triton's interpreter.

On hardware a cast is one instruction that rounds to nearest even, saturates to E4M3's 448 and keeps a NaN. The
interpreter's casts do none of it: FP32 to E4M3 loses the carry out of the mantissa and truncates subnormals, FP32 to
BF16 truncates, and its product of BF16 operands is wrong. So values are first rounded onto the grid of the target
format in FP32, after which any cast is exact. All of that stands behind the constant INTERPRETED and is compiled out on
hardware.

Division is `tl.div_rn` throughout: `/` is an approximation on a GPU. amax is taken on bit patterns, as the
specification does: with the sign cleared, IEEE numbers are ordered as integers are, NaN on top, whereas a maximum of
numbers drops the NaN that must make its scale non-finite.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
E4M3_MAX = tl.constexpr(448.0)
TILE = tl.constexpr(128)


@triton.jit
def magnitude_bits(x):
    """|x| of FP32 as integers of the same order."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, floor, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """max(amax, floor) / LARGEST, rounded up to a power of two when asked; `bits` are amax's magnitude bits."""
    floor_bits = tl.cast(floor, tl.float32).to(tl.int32, bitcast=True)
    amax = tl.maximum(bits, floor_bits).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:
        scale_bits = scale.to(tl.int32, bitcast=True)
        up = (scale_bits + 0x7FFFFF) & 0x7F800000
        # A mantissa that isn't zero carries into the exponent; infinity and NaN stay as they are.
        scale = tl.where(scale_bits < 0x7F800000, up, scale_bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse_of(scale):
    """1 / scale, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def round_to_grid(x, LARGEST: tl.constexpr, DROPPED: tl.constexpr, SMALLEST: tl.constexpr, MAGIC: tl.constexpr):
    """FP32 rounded to nearest even onto a narrower format, saturating; zeros keep their sign.

    DROPPED: mantissa bits the format lacks. SMALLEST: its smallest normal number. MAGIC: 1.5 x 2^23 x its subnormal
    step, a number whose own last place is that step: adding and subtracting it rounds a subnormal.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = bits & -0x80000000
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    limited = tl.where(magnitude > LARGEST, LARGEST, magnitude)  # a NaN compares false and stays
    limited_bits = limited.to(tl.int32, bitcast=True)
    half_below = (1 << (DROPPED - 1)) - 1
    normal = (limited_bits + half_below + ((limited_bits >> DROPPED) & 1)) & -(1 << DROPPED)
    subnormal = ((limited + MAGIC) - MAGIC).to(tl.int32, bitcast=True)
    rounded = tl.where(limited < SMALLEST, subnormal, normal) | sign
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """FP32 -> E4M3, to nearest even, saturating."""
    if INTERPRETED:
        x = round_to_grid(x, E4M3_MAX, 20, 2.0**-6, 24576.0)
    return x.to(tl.float8e4nv)


@triton.jit
def to_output(x, DTYPE: tl.constexpr):
    """FP32 -> BF16 or FP32, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
