"""The arithmetic of formats.py for kernels, to the bit."""

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """|x|, and 0 for NaN."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def scale_of(most, LARGEST: tl.constexpr):
    """The scale of values whose largest magnitude is `most`: float32's largest stands for infinity, 2⁻¹²⁶ is the least."""
    scale = tl.maximum(tl.div_rn(tl.minimum(most, 3.4028234663852886e38), LARGEST), 1.1754943508222875e-38)
    return tl.where(most == 0.0, 1.0, scale)


@triton.jit
def encode(x, scale, dtype: tl.constexpr):
    """x / scale rounded to nearest even, saturating: one division a scale, each quotient corrected by its remainder."""
    # Powers of two keep reciprocal and remainder among the normal numbers for any scale.
    shift = tl.where(scale < 5.421010862427522e-20, 18446744073709551616.0, 1.0)
    shift = tl.where(scale > 18446744073709551616.0, 5.421010862427522e-20, shift)
    divisor = scale * shift
    reciprocal = tl.div_rn(1.0, divisor)
    x = x * shift
    quotient = x * reciprocal
    corrected = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    # Where a code saturates or is zero the quotient will do, and the remainder may be no number, or lose the sign of zero.
    size = tl.abs(quotient)
    quotient = tl.where((size > 0.000244140625) & (size < 512.0), corrected, quotient)
    if dtype == tl.int8:
        limited = tl.minimum(tl.maximum(tl.where(quotient == quotient, quotient, 0.0), -127.0), 127.0)
        # Above 1.5 · 2²³ float32 has no fractions: the sum is rounded to nearest even.
        return ((limited + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        # The conversion saturates: cvt.rn.satfinite.
        return quotient.to(dtype)
