"""The pass of `sample` over all logits, and the slots of a row's state."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from penstock.ops.sampling._weights_triton import clean, option, scale_of, weigh

# Slots of a row's state. Floats: largest logit, scale; first bounds of the candidates (low <= logit < high), last logit kept,
# and the bounds that the gathering pass used.
TOP = tl.constexpr(0)
SCALE = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
CUT = tl.constexpr(4)
USED_LOW = tl.constexpr(5)
USED_HIGH = tl.constexpr(6)
FLOATS = tl.constexpr(8)
# Integers: what the filters are, whether the id is still to be decided; number of candidates, last id kept at the cut, whether
# the first bounds are too wide.
MODE = tl.constexpr(0)
PENDING = tl.constexpr(1)
COUNT = tl.constexpr(2)
CUT_ID = tl.constexpr(3)
WIDE = tl.constexpr(4)
INTS = tl.constexpr(8)
# Masses: what top-p asks for, what the filters keep; above the candidates, from the gathering pass and from the narrowing one.
NEEDED = tl.constexpr(0)
KEPT = tl.constexpr(1)
SURE = tl.constexpr(2)
FIRST_SURE = tl.constexpr(3)
MASSES = tl.constexpr(4)
# Modes: one id is certain; cut by top-k, whose cut is known; not cut; cut by top-p.
CERTAIN = tl.constexpr(0)
COUNTED = tl.constexpr(1)
WHOLE = tl.constexpr(2)
BY_MASS = tl.constexpr(3)
BINS = tl.constexpr(64)


@triton.jit
def _store_sums(pointers, x, maxima, scale, weighs, inside):
    if weighs:
        # -inf less -inf would be NaN.
        finite = tl.where(maxima == float("-inf"), 0.0, maxima)
        tl.store(pointers, tl.sum(weigh(x, finite[:, None], scale), axis=1), inside)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(
    maxima_ptr,
    sums_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    temperature,
    top_k,
    V,
    logits_stride,
    blocks,
    MAY_BE_WHOLE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest logit of every tile, -inf past the row's end; in rows without top-k the sum of weights relative to it."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    scale = 1.0
    weighs = False
    if MAY_BE_WHOLE:
        heat = option(temperature_ptr, row, temperature, tl.float32)
        k = option(top_k_ptr, row, top_k, tl.int32)
        weighs = ((k <= 0) | (k >= V)) & (heat > 0)
        scale = scale_of(tl.where(heat > 0, heat, 1.0))
    first = tl.program_id(1) * blocks
    for block in range(first, first + blocks):
        tiles = block * TILES + tl.arange(0, TILES)
        columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        maxima = tl.max(x, axis=1)
        tl.store(maxima_ptr + row * PADDED_TILES + tiles, maxima, tiles < PADDED_TILES)
        if MAY_BE_WHOLE:
            _store_sums(sums_ptr + row * PADDED_TILES + tiles, x, maxima, scale, weighs, tiles < PADDED_TILES)
