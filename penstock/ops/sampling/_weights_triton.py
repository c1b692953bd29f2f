"""The weights of _weights.py on the device, bit for bit, and the options of a row.

Launch with enable_fp_fusion=False: a fused multiply-add rounds once where the definition rounds twice.
"""

import triton
import triton.language as tl

from penstock.ops.sampling import _weights

ONE = tl.constexpr(_weights.ONE)
# 1.5 · 2**23: a sum with it is rounded to a whole number, half to even, which stands in its lowest bits.
ROUND = tl.constexpr(12582912.0)
C6 = tl.constexpr(_weights.POLYNOMIAL[0])
C5 = tl.constexpr(_weights.POLYNOMIAL[1])
C4 = tl.constexpr(_weights.POLYNOMIAL[2])
C3 = tl.constexpr(_weights.POLYNOMIAL[3])
C2 = tl.constexpr(_weights.POLYNOMIAL[4])
C1 = tl.constexpr(_weights.POLYNOMIAL[5])
LOWEST = tl.constexpr(_weights.LOWEST)
LOG2E = tl.constexpr(_weights.LOG2E)
LARGEST = tl.constexpr(_weights.LARGEST)
TWO_62 = tl.constexpr(2.0**62)
TWO_63 = tl.constexpr(2.0**63)


@triton.jit
def clean(x):
    """Logits as float32: NaN becomes -inf, +inf the largest finite number."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    return tl.minimum(x, LARGEST)


@triton.jit
def scale_of(temperature):
    """log2(e) / temperature."""
    return tl.minimum(tl.div_rn(1.0, temperature) * LOG2E, LARGEST)


@triton.jit
def weigh(x, top, scale):
    """Integer weights of clean logits; top must be above -inf."""
    exponent = tl.maximum((x - top) * scale, LOWEST)
    whole = exponent + ROUND
    exponent = exponent - (whole - ROUND)
    power = exponent * C6
    power = (power + C5) * exponent
    power = (power + C4) * exponent
    power = (power + C3) * exponent
    power = (power + C2) * exponent
    power = (power + C1) * exponent
    power = power + 1.0
    bits = power.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23) + (ONE << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def key_of(x):
    """An integer that orders clean logits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The logit of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def at_least(fraction, mass):
    """The smallest integer >= fraction · mass, and at least 1, for a fraction in [0, 1)."""
    steps = (fraction * TWO_63).to(tl.int64)
    twice = mass * 2
    high = tl.umulhi(twice.to(tl.uint64), steps.to(tl.uint64)).to(tl.int64)
    return tl.maximum(high + ((twice * steps) != 0).to(tl.int64), 1)


@triton.jit
def share(fraction, mass):
    """floor(fraction · mass) for a fraction clamped to [0, 1]; 0 for NaN."""
    steps = (tl.minimum(tl.where(fraction > 0, fraction, 0.0), 1.0) * TWO_62).to(tl.int64)
    return tl.umulhi((mass * 4).to(tl.uint64), steps.to(tl.uint64)).to(tl.int64)


@triton.jit
def random_words(seed, offset, stream, turn):
    """The first and the last 64 bits of Philox4x32-10."""
    lower = (offset & 0xFFFFFFFF).to(tl.uint32)
    upper = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = lower ^ lower
    word0, word1, word2, word3 = tl.philox(seed, lower, upper, zero + stream, zero + turn.to(tl.uint32))
    return word0.to(tl.uint64) | (word1.to(tl.uint64) << 32), word2.to(tl.uint64) | (word3.to(tl.uint64) << 32)


@triton.jit
def smallest_weight(min_p):
    """The weight that min-p asks for, at least 1."""
    wanted = min_p * 1099511627776.0
    whole = wanted.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float32) < wanted).to(tl.int64), 1)


@triton.jit
def option(pointer, row, value, dtype: tl.constexpr):
    """The row's option: its entry where a tensor is given, the number otherwise."""
    if pointer is not None:
        return tl.load(pointer + row).to(dtype)
    else:
        return tl.zeros([], dtype) + value
