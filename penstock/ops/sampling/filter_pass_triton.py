"""The passes of the exact filter over whole rows: many programs a row, each over some of its tiles."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling._state_triton import (
    BINS,
    BY_MASS,
    COUNT,
    FIRST_SURE,
    FLOATS,
    HIGH,
    INTS,
    LOW,
    MASSES,
    MODE,
    NEEDED,
    SCALE,
    SURE,
    TOP,
    USED_HIGH,
    USED_LOW,
    WHOLE,
    WIDE,
)
from penstock.ops.sampling._weights_triton import clean, option, smallest_weight, weigh


@triton.jit(do_not_specialize=["blocks"])
def narrow_kernel(
    counts_ptr,
    floats_ptr,
    ints_ptr,
    sums_ptr,
    logits_ptr,
    V,
    logits_stride,
    blocks,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows with wide bounds: how many ids fall in each of the equal parts of the bounds, and the masses above and in all."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints_ptr + row * INTS + WIDE) != 0:
        logits_ptr += row * logits_stride
        floats_ptr += row * FLOATS
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low = tl.load(floats_ptr + LOW)
        high = tl.load(floats_ptr + HIGH)
        start = tl.minimum(high, top)
        per_bin = BINS / (start - low)
        sure = tl.zeros([BLOCK], tl.int64)
        counts = tl.zeros([BINS], tl.int32)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < V
            x = clean(tl.load(logits_ptr + columns, inside, other=float("-inf")))
            weights = tl.where(inside, weigh(x, top, scale), 0)
            sure += tl.where(x >= high, weights, 0)
            between = inside & (x >= low) & (x < high)
            bins = tl.minimum(tl.maximum((start - x) * per_bin, 0.0), BINS - 1.0).to(tl.int32)
            counts += tl.histogram(bins, BINS, mask=between)
        tl.atomic_add(counts_ptr + row * BINS + tl.arange(0, BINS), counts, sem="relaxed")
        tl.atomic_add(sums_ptr + row * MASSES + FIRST_SURE, tl.sum(sure), sem="relaxed")


@triton.jit
def _narrowed(low, high, top, scale, counts_ptr, sums_ptr):
    """Tighter bounds of the cut: the mass of a part lies between its number of ids at its lowest and at its highest weight."""
    start = tl.minimum(high, top)
    width = (start - low) / BINS
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins).to(tl.float32)
    one = 1099511627776.0
    heaviest = tl.exp2((start - bins * width - top) * scale) * one
    lightest = tl.exp2((start - (bins + 1) * width - top) * scale) * one
    sure = tl.load(sums_ptr + FIRST_SURE).to(tl.float32)
    needed = tl.load(sums_ptr + NEEDED).to(tl.float32)
    # The slack covers float32 sums.
    first = tl.min(tl.where(sure + tl.cumsum(counts * heaviest) >= needed * 0.99999, bins, BINS))
    last = tl.min(tl.where(sure + tl.cumsum(counts * lightest) >= needed * 1.00001, bins, BINS))
    tight_high = tl.where(first > 0, start - first * width, high)
    tight_low = tl.where(last < BINS - 1, start - (last + 1) * width, low)
    return tight_low, tight_high


@triton.jit(do_not_specialize=["blocks"])
def gather_kernel(
    masses_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    floats_ptr,
    ints_ptr,
    sums_ptr,
    counts_ptr,
    maxima_ptr,
    logits_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    blocks,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Collects the candidates of a row in any order, and the exact masses of the tiles above them."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    mode = tl.load(ints_ptr + row * INTS + MODE)
    if mode >= WHOLE:
        logits_ptr += row * logits_stride
        maxima_ptr += row * PADDED_TILES
        masses_ptr += row * PADDED_TILES
        floats_ptr += row * FLOATS
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low = tl.load(floats_ptr + LOW)
        high = tl.load(floats_ptr + HIGH)
        if tl.load(ints_ptr + row * INTS + WIDE) != 0:
            low, high = _narrowed(low, high, top, scale, counts_ptr + row * BINS, sums_ptr + row * MASSES)
        if tl.program_id(1) == 0:
            tl.store(floats_ptr + USED_LOW, low)
            tl.store(floats_ptr + USED_HIGH, high)
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        sure = tl.zeros([TILES], tl.int64)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            tiles = block * TILES + tl.arange(0, TILES)
            columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
            weights = weigh(x, top, scale)
            if mode == BY_MASS:
                above = tl.where(x >= high, weights, 0)
                sure += tl.sum(above, axis=1)
                mass = tl.sum(tl.where(above >= smallest, above, 0), axis=1)
                largest = tl.load(maxima_ptr + tiles, tiles < PADDED_TILES, other=float("-inf"))
                if tl.max(largest) >= low:
                    chosen = (columns < V) & (x >= low) & (x < high)
                    found = tl.sum(tl.sum(chosen.to(tl.int32), axis=1))
                    if found > 0:
                        base = tl.atomic_add(ints_ptr + row * INTS + COUNT, found, sem="relaxed")
                        flags = tl.reshape(chosen.to(tl.int32), [TILES * TILE])
                        slots = base + tl.reshape(tl.cumsum(flags) - flags, [TILES, TILE])
                        writes = chosen & (slots < capacity)
                        tl.store(candidates_ptr + row * capacity + slots, x, writes)
                        tl.store(candidate_ids_ptr + row * capacity + slots, columns, writes)
            else:
                mass = tl.sum(tl.where(weights >= smallest, weights, 0), axis=1)
            tl.store(masses_ptr + tiles, mass, tiles < PADDED_TILES)
        if mode == BY_MASS:
            tl.atomic_add(sums_ptr + row * MASSES + SURE, tl.sum(sure), sem="relaxed")
