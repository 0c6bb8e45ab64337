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
E4M3_MAX_BITS = tl.constexpr(0x43E00000)
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


@triton.jit
def larger(a, b):
    """The larger of two numbers, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_bits(x, AXIS: tl.constexpr):
    """`magnitude_bits` of the largest |x| along AXIS, NaN on top: one instruction a value on hardware, where a maximum
    of bit patterns takes two."""
    if INTERPRETED:  # where a combining function runs once a number
        return tl.max(magnitude_bits(x), axis=AXIS)
    return tl.reduce(tl.abs(x), AXIS, larger).to(tl.int32, bitcast=True)


@triton.jit
def power_of_two_above(bits, floor, LARGEST_BITS: tl.constexpr):
    """`scale_of` with POWER_OF_TWO for a floor of 1e-30 or more, bit for bit, without a division.

    The quotient of amax and LARGEST, the bits of which are given, is at most a power of two or just above one as the
    mantissa of amax is at most that of LARGEST or beyond it, and one too small to survive FP32 does not occur.
    """
    bits = tl.maximum(bits, tl.cast(floor, tl.float32).to(tl.int32, bitcast=True))
    carry: tl.constexpr = 0x7FFFFF - (LARGEST_BITS & 0x7FFFFF)
    up = ((bits + carry) & 0x7F800000) - ((LARGEST_BITS & 0x7F800000) - 0x3F800000)
    return tl.where(bits < 0x7F800000, up, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale_of(bits, floor, POWER_OF_TWO: tl.constexpr):
    """`scale_of` for E4M3 and a floor of 1e-30 or more, bit for bit, without the dozen instructions of a division.

    The quotient by the reciprocal is corrected by its remainder, which an FMA gives exactly (Markstein, 1990,
    "Computation of elementary functions on the IBM RISC System/6000 processor"); a test tries every mantissa.
    """
    if POWER_OF_TWO:
        return power_of_two_above(bits, floor, E4M3_MAX_BITS)
    if INTERPRETED:  # whose multiply-add rounds twice
        return scale_of(bits, floor, E4M3_MAX, POWER_OF_TWO)
    bits = tl.maximum(bits, tl.cast(floor, tl.float32).to(tl.int32, bitcast=True))
    amax = bits.to(tl.float32, bitcast=True)
    quotient = amax * (1.0 / 448.0)
    remainder = tl.fma(quotient, -448.0, amax)
    return tl.where(remainder == remainder, tl.fma(remainder, 1.0 / 448.0, quotient), quotient)


@triton.jit
def reciprocal_of(x):
    """1 / x, correctly rounded: `inverse_of` in half the instructions."""
    if INTERPRETED:
        return inverse_of(x)
    return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def inverse_of_scale(scale, POWER_OF_TWO: tl.constexpr):
    """`inverse_of` a finite scale, of a power of two in one instruction; of another scale any number."""
    if POWER_OF_TWO:
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return reciprocal_of(scale)


@triton.jit
def to_e4m3_words(x):
    """`to_e4m3`, where a lane has 4 neighbours along the last dim: they are packed as they are cast."""
    if INTERPRETED:
        return to_e4m3(x)
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r", [x], dtype=tl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def sigmoid(x):
    """sigma = 1 / (1 + e^-x) in FP32, to a relative 2^-22 + (1 - sigma) (2^-22 + |x| 2^-23), or 2^-126.

    ex2 and rcp as the hardware approximates them, four instructions; `tl.sigmoid` takes fourteen and is no more exact
    where e^-x is large. Below -88, where e^-x is beyond FP32, it is 0.
    """
    denominator = 1.0 + tl.exp2(x * -1.4426950408889634)
    if INTERPRETED:
        return 1.0 / denominator
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [denominator], dtype=tl.float32, is_pure=True, pack=1
    )
