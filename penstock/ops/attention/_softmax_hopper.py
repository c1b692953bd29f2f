"""Online softmax on Hopper's accumulators, in base 2: masks, one step, the end. All of it stays in a warpgroup's registers.

A thread holds two rows, and in each of them two neighbouring columns of every eight. Viewed as [rows, columns / 8, 8] the
middle index numbers registers, so that what depends on it is known when compiling.
"""

from penstock.core.gluon import gl, gluon

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def tanh(x):
    """1 - 2 / (e^2x + 1); near zero exact to 1e-7 in absolute terms, which is what counts in an exponent."""
    return 1.0 - 2.0 / (gl.exp2(x * 2.8853900817779268) + 1.0)


@gluon.jit
def masked(s, own_first, n0, k_len, left, right, C: gl.constexpr):
    """Scores of keys n0, n0 + 1, ...; -inf where a row's query does not see the key. The first row stands on own_first."""
    split = gl.reshape(s, [C.rows, C.block_n // 8, 8])
    layout: gl.constexpr = split.type.layout
    eights = gl.arange(0, C.block_n // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout))) * 8
    ones = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    rows = gl.arange(0, C.rows, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    own = own_first - n0 + rows // C.group
    last = rows * 0 + (k_len - 1 - n0)
    if C.has_right:
        last = gl.minimum(own + right, last)
    eights = gl.expand_dims(gl.expand_dims(eights, 0), 2)
    ones = gl.expand_dims(gl.expand_dims(ones, 0), 1)
    seen = eights <= gl.expand_dims(gl.expand_dims(last, 1), 2) - ones
    if C.has_left:
        seen = seen & (eights >= gl.expand_dims(gl.expand_dims(own - left, 1), 2) - ones)
    whole = gl.reshape(gl.where(seen, split, float("-inf")), [C.rows, C.block_n])
    return gl.convert_layout(whole, C.scores_layout, assert_trivial=True)


@gluon.jit
def partial_sum(p, C: gl.constexpr):
    """[rows, 8]: sums of what each thread holds, without a shuffle."""
    return gl.sum(gl.reshape(p, [C.rows, C.block_n // 8, 8]), axis=1)


@gluon.jit
def finite(m):
    """A row with every key masked so far has m = -inf; 0 there keeps -inf - -inf away."""
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def times(s, factor, C: gl.constexpr):
    """Scores times a factor, which FP8 has for each row."""
    if C.kind == "fp8":
        factor = factor[:, None]
    return s * factor


@gluon.jit
def lifted(base, C: gl.constexpr):
    """What is taken off the scores: for FP8 8 less than the maximum, so that weights of 2^-17 still have a code."""
    if C.kind == "fp8":
        base = base - 8.0
    return base


@gluon.jit
def begin(s, score_scale, C: gl.constexpr):
    """(weights, maximum of the scores, partial sums) of the first block."""
    m = gl.max(s, axis=1)
    p = gl.exp2(times(s, score_scale, C) - lifted(finite(m * score_scale), C)[:, None])
    return p, m, partial_sum(p, C)


@gluon.jit
def advance(s, m, l, score_scale, MASKED: gl.constexpr, C: gl.constexpr):
    """(weights, new maximum, new partial sums, factor of what was summed before) with one more block."""
    m_new = gl.maximum(m, gl.max(s, axis=1))
    base = m_new * score_scale
    if MASKED:
        base = finite(base)
    alpha = gl.exp2(m * score_scale - base)
    p = gl.exp2(times(s, score_scale, C) - lifted(base, C)[:, None])
    layout: gl.constexpr = l.type.layout
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, layout))[:, None] + partial_sum(p, C)
    return p, m_new, l, alpha


@gluon.jit
def scaled(o, factor):
    """Rows of an accumulator times a factor each."""
    layout: gl.constexpr = o.type.layout
    return o * gl.convert_layout(factor, gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def finish(m, l, score_scale, sink, C: gl.constexpr):
    """(factor of the accumulator, natural logarithm of the denominator) of each row; 0 and -inf where no key was seen.

    A row has a sink in base 2, or -inf.
    """
    l_row = gl.convert_layout(gl.sum(l, axis=1), gl.SliceLayout(1, C.scores_layout))
    top = m * score_scale
    dead = m == float("-inf")
    highest = gl.maximum(top, sink)
    shrink = gl.where(dead, 0.0, gl.exp2(top - highest))
    if C.kind == "fp8":
        l_row *= 0.00390625
    l_row = l_row * shrink + gl.exp2(sink - highest)
    l_row = gl.where(dead, 1.0, l_row)
    lse = gl.where(dead, float("-inf"), (highest + gl.log2(l_row)) * LN2)
    factor = shrink / l_row
    if C.kind == "fp8":
        factor *= 0.00390625
    return factor, lse


@gluon.jit
def as_operand(p, C: gl.constexpr):
    """Weights in the accumulator's layout, rounded and relabelled as the left operand of the next product; nothing moves.

    A plain cast compiles to one conversion a value and a byte permutation; this is one instruction for a pair. Of FP8's codes
    four are neighbours in the operand and two in the accumulator: they change places within groups of four threads.
    """
    if C.kind == "fp8":
        pairs = p.to(gl.float8e4nv)
    elif C.kind == "bf16":
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        pairs = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=True, pack=2)
    return gl.convert_layout(pairs, gl.DotOperandLayout(0, C.result_layout, 4 // C.itemsize))
