"""Online softmax on Hopper's accumulators, in base 2: masks, one step, the end. All of it stays in a warpgroup's registers.

A thread holds two rows, and in each of them two neighbouring columns of every eight. Viewed as [rows, columns / 8, 8] the
middle index numbers registers, so that what depends on it is known when compiling.
"""

from penstock.core.gluon import gl, gluon, reinterpret

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
    if C.kind == "fp8":
        # Keys are dealt out as `load.dealt_descriptor` has them: 8 · half + sixteen, 2 · four + key.
        eights = eights % (C.block_n // 2) * 2 + eights // (C.block_n // 2) * 2
        ones = ones // 2 * 4 + ones % 2
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
def highest(s, C: gl.constexpr):
    """The maximum of each row."""
    if C.chains:
        columns = gl.max(gl.reshape(s, [C.rows, C.block_n // 8, 8]), axis=1)
        m = gl.convert_layout(gl.max(columns, axis=1), gl.SliceLayout(1, C.scores_layout), assert_trivial=True)
    else:
        m = gl.max(s, axis=1)
    return m


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
    m = highest(s, C)
    p = gl.exp2(times(s, score_scale, C) - lifted(finite(m * score_scale), C)[:, None])
    return p, m, partial_sum(p, C)


@gluon.jit
def advance(s, m, l, score_scale, MASKED: gl.constexpr, C: gl.constexpr):
    """(weights, new maximum, new partial sums, factor of what was summed before) with one more block."""
    m_new = gl.maximum(m, highest(s, C))
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
def scale_keys(s, scales, C: gl.constexpr):
    """FP8 scores times the scales of their keys, which stand in shared memory in the order of the keys."""
    dealt = gl.reshape(s, [C.rows, 2, C.block_n // 16, 4, 2])
    layout: gl.constexpr = dealt.type.layout
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    scales = reinterpret(scales, gl.float32, [C.block_n // 16, 4, 2, 2], plain).permute((2, 0, 1, 3))
    factors = gl.expand_dims(scales.load(gl.SliceLayout(0, layout)), 0)
    return gl.convert_layout(gl.reshape(dealt * factors, [C.rows, C.block_n]), C.scores_layout, assert_trivial=True)


@gluon.jit
def held(p, C: gl.constexpr):
    """Weights as they are kept from step to step: rounded, but for FP8, whose codes a loop would carry in a register each."""
    if C.codes:
        p = packed(p)
    elif C.kind != "fp8":
        p = as_operand(p, C)
    return p


@gluon.jit
def taken(p, C: gl.constexpr):
    """Held weights as the left operand of a product."""
    if C.codes:
        p = unpacked(p, C)
    elif C.kind == "fp8":
        p = as_operand(p, C)
    return p


@gluon.jit
def rounded(p, C: gl.constexpr):
    """FP8 weights, two to an integer of 16 bits: the former and the latter of the four that a product takes from a register.

    Apart until `packed` joins them: what is written to a product's operand before an earlier product is waited for makes the
    assembler wait for each product alone.
    """
    dealt = gl.permute(gl.reshape(p, [C.rows, 2, C.block_n // 16, 4, 2]), (0, 2, 3, 1, 4))
    even, odd = gl.split(gl.reshape(dealt, [C.rows, C.block_n // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return _pair(first, second), _pair(third, fourth)


@gluon.jit
def _pair(first, second):
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,r,r", [first, second], dtype=gl.int16, is_pure=True, pack=1
    )


@gluon.jit
def packed(pairs):
    """The four codes of each product's register in one integer."""
    former, latter = pairs
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [former, latter], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(codes, C: gl.constexpr):
    """What `packed` made as the left operand of the next product; cut in halves twice, which the compiler takes back."""
    low, high = codes.to(gl.int16), (codes >> 16).to(gl.int16)
    even = gl.join(low.to(gl.int8), high.to(gl.int8))
    odd = gl.join((low >> 8).to(gl.int8), (high >> 8).to(gl.int8))
    whole = gl.reshape(gl.join(even, odd), [C.rows, C.block_n]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(whole, gl.DotOperandLayout(0, C.result_layout, 4), assert_trivial=True)


@gluon.jit
def as_operand(p, C: gl.constexpr):
    """Weights in the accumulator's layout, rounded and relabelled as the left operand of the next product; nothing moves.

    A plain cast compiles to one conversion a value and permutations of bytes; here a register's worth is converted at once.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, C.result_layout, 4 // C.itemsize)
    if C.kind == "fp8":
        dealt = gl.permute(gl.reshape(p, [C.rows, 2, C.block_n // 16, 4, 2]), (0, 2, 3, 1, 4))
        p = gl.convert_layout(gl.reshape(dealt, [C.rows, C.block_n]), operand, assert_trivial=True)
        codes = gl.inline_asm_elementwise(
            "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
            "mov.b32 $0, {a, b}; }",
            "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    elif C.kind == "bf16":
        codes = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        codes = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=True, pack=2)
    return gl.convert_layout(codes, operand, assert_trivial=True)
