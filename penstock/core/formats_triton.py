"""The arithmetic of formats.py for kernels, to the bit, and the cutting of rows into units.

A unit is a run of a row that shares a scale, or a part of one when the scale is known.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from penstock.core.formats import BLOCK, Format


@triton.jit
def magnitude(x):
    """|x|, and 0 for NaN."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def largest(x, axis: tl.constexpr):
    """max |x| along an axis: the maximum itself leaves NaN out, unless there is nothing else."""
    return magnitude(tl.max(tl.abs(x), axis=axis))


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
    # Where a code saturates the quotient need not be known, and an infinite one would have no remainder.
    quotient = tl.clamp(x * reciprocal, -512.0, 512.0)
    # Of these signs a zero keeps its own: 0 · divisor − 0 is +0, which a negative factor turns into what adds nothing to −0.
    quotient = tl.fma(tl.fma(quotient, divisor, -x), -reciprocal, quotient)
    if dtype == tl.int8:
        limited = tl.clamp(tl.where(quotient == quotient, quotient, 0.0), -127.0, 127.0)
        # Above 1.5 · 2²³ float32 has no fractions: the sum is rounded to nearest even, its last byte is the code.
        return (limited + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # The conversion saturates: cvt.rn.satfinite.
        return quotient.to(dtype)


@triton.jit
def encode_groups(x, scale_ptr, at, live, LARGEST: tl.constexpr, DYNAMIC: tl.constexpr, dtype: tl.constexpr):
    """The codes of rows x [R, C] whose every 128 columns share a scale; `at` [R, C / 128] says where the scales lie."""
    groups = tl.reshape(x, (x.shape[0], x.shape[1] // 128, 128))
    if DYNAMIC:
        scale = scale_of(largest(groups, 2), LARGEST)
        tl.store(scale_ptr + at, scale, live)
    else:
        scale = tl.load(scale_ptr + at, live, other=1.0)
    return tl.reshape(encode(groups, scale[:, :, None], dtype), (x.shape[0], x.shape[1]))


@dataclass(frozen=True)
class Launch:
    """A program takes `units` units of a row, `block` columns of each at a time, with num_warps warps."""

    units: int
    block: int
    num_warps: int


def configure(width: int) -> Launch:
    """Sixteen values a thread: two 16-byte loads in bfloat16, one 16-byte store of codes."""
    block = triton.next_power_of_2(max(width, 1))
    if block > 16384:
        return Launch(1, 8192, 16)
    units = max(1, min(64, 2048 // block))
    return Launch(units, block, max(4, units * block // 512))


@triton.jit
def place_units(units, num_units, per_row, width, inner):
    """(live, outer, step, start) of units: rows as `walk_rows` has them, and the first column."""
    rows = units // per_row
    return (
        (units < num_units)[:, None],
        (rows // inner).to(tl.int64)[:, None],
        (rows % inner).to(tl.int64)[:, None],
        (units % per_row * width)[:, None],
    )


@triton.jit
def scale_index(units, per_row, N, SHARE: tl.constexpr):
    """Which scale serves a unit."""
    if SHARE == "tensor":
        return units * 0
    elif SHARE == "row":
        return units // per_row
    elif SHARE == "block":
        return units
    else:
        row = units // per_row
        return (row // N * tl.cdiv(N, 128) + row % N // 128) * per_row + units % per_row


def units_of(K: int, format: Format, dynamic: bool) -> tuple[str, int, int]:
    """(what shares a scale, units of a row, their width)."""
    if format.granularity == "block":
        return "block", triton.cdiv(K, BLOCK), BLOCK
    share = "tensor" if format.granularity == "tensor" else "row"
    # A scale that is known lets a row be cut anywhere.
    width = K if dynamic and share == "row" else min(K, 2048)
    return share, triton.cdiv(K, width), width
