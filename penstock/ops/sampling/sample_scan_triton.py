"""The pass of `sample` over all logits.

A tile of 128 ids lies in 8 lanes (float32), 16 ids in each, instead of in 32 lanes with 4: sums along a tile are additions in a
lane and three exchanges for 16 ids, where they were five for 4. A lane's 16 ids are four vectors 32 ids apart, so that 8 lanes
still read 128 bytes in a row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from penstock.ops.sampling._weights_triton import clean, option, scale_of, weigh


@triton.jit
def columns_of(tiles, TILE: tl.constexpr, PART: tl.constexpr):
    """[tiles, TILE / PART, PART]: the ids of tiles; the second dimension lies in registers."""
    parts = tl.arange(0, TILE // PART)[None, :, None] * PART
    return tiles[:, None, None] * TILE + parts + tl.arange(0, PART)[None, None, :]


@triton.jit(do_not_specialize=["top_k", "blocks"])
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
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest logit of every tile, -inf past the row's end; in rows without top-k the sum of weights relative to it."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    maxima_ptr += row * PADDED_TILES
    scale = 1.0
    weighs = False
    if MAY_BE_WHOLE:
        sums_ptr += row * PADDED_TILES
        heat = option(temperature_ptr, row, temperature, tl.float32)
        k = option(top_k_ptr, row, top_k, tl.int32)
        weighs = ((k <= 0) | (k >= V)) & (heat > 0)
        scale = scale_of(tl.where(heat > 0, heat, 1.0))
    first = tl.program_id(1) * blocks
    for block in range(first, first + blocks):
        tiles = block * TILES + tl.arange(0, TILES)
        columns = columns_of(tiles, TILE, PART)
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        maxima = tl.max(tl.max(x, axis=1), axis=1)
        inside = tiles < PADDED_TILES
        tl.store(maxima_ptr + tiles, maxima, inside)
        if MAY_BE_WHOLE:  # noqa: SIM102
            if weighs:
                # -inf less -inf would be NaN.
                finite = tl.where(maxima == float("-inf"), 0.0, maxima)
                weights = weigh(x, finite[:, None, None], scale)
                tl.store(sums_ptr + tiles, tl.sum(tl.sum(weights, axis=1), axis=1), inside)
