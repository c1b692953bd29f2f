"""The steps of the exact filter between its passes: one program a row."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling._search_triton import elements, past, search, tie_cut
from penstock.ops.sampling._state_triton import (
    BINS,
    BY_MASS,
    COUNT,
    CUT,
    CUT_ID,
    FLOATS,
    HIGH,
    INTS,
    KEPT,
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
from penstock.ops.sampling._weights_triton import clean, key_of, logit_of, option, smallest_weight, weigh

SAMPLES = tl.constexpr(4096)
STEPS = tl.constexpr(512)
NARROW_ENOUGH = tl.constexpr(2048)
DEVIATIONS = tl.constexpr(4.0)
MARGIN = tl.constexpr(128.0)


@triton.jit
def _mass_bounds(maxima, top, scale, p, logits_ptr, maxima_ptr, V, TILE: tl.constexpr):
    """Bounds between which the cut of top-p almost surely lies, and about how many ids they hold.

    The tiles' maxima are taken as they are; every other id is estimated from an even sample of the row.
    """
    at = (tl.arange(0, SAMPLES).to(tl.int64) * V // SAMPLES).to(tl.int32)
    x = clean(tl.load(logits_ptr + at))
    is_max = x >= tl.load(maxima_ptr + at // TILE)
    rest = (is_max == 0) & (x > float("-inf"))
    expansion = (V - V // TILE) / tl.maximum(SAMPLES - tl.sum(is_max.to(tl.int32)), 1).to(tl.float32)
    lowest = tl.min(tl.where(x > float("-inf"), x, top))
    # Weights further away are zero.
    span = tl.maximum(tl.minimum(top - lowest, 41.0 / scale), 1e-30)
    per_step = (STEPS - 1.0) / span
    found = tl.histogram(tl.minimum((top - x) * per_step, STEPS - 1.0).to(tl.int32), STEPS, mask=rest).to(tl.float32)
    own = tl.histogram(tl.minimum((top - maxima) * per_step, STEPS - 1.0).to(tl.int32), STEPS, mask=maxima > float("-inf"))
    steps = tl.arange(0, STEPS)
    share = tl.exp2(-(steps + 0.5) / per_step * scale)
    number = own.to(tl.float32) + found * expansion
    cumulative = tl.cumsum(number * share)
    total = tl.sum(number * share)
    variance = found * (expansion * share) * (expansion * share)
    above = tl.cumsum(variance)
    below = tl.maximum(tl.sum(variance) - above, 0.0)
    fraction = cumulative / total
    deviation = DEVIATIONS * tl.sqrt((1 - fraction) * (1 - fraction) * above + fraction * fraction * below) / total
    first = tl.min(tl.where(fraction + deviation >= p, steps, STEPS)) - 1
    last = tl.min(tl.where(fraction - deviation >= p, steps, STEPS)) + 1
    # Where few ids carry the mass the sample says little about the spread, and candidates are cheap.
    ranks = tl.cumsum(number)
    middle = tl.sum(tl.where(fraction < p, number, 0.0))
    first = tl.minimum(first, tl.min(tl.where(ranks >= middle - MARGIN, steps, STEPS)))
    last = tl.maximum(last, tl.min(tl.where(ranks >= middle + MARGIN, steps, STEPS)))
    high = tl.where(first > 0, top - first / per_step, float("inf"))
    low = tl.maximum(top - (last + 1) / per_step, top - span)
    return low, high, tl.sum(tl.where((steps >= first) & (steps <= last), number, 0.0))


@triton.jit
def bounds_kernel(
    floats_ptr,
    ints_ptr,
    counts_ptr,
    maxima_ptr,
    logits_ptr,
    top_p_ptr,
    top_p,
    V,
    logits_stride,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Tells between which logits the cut of top-p lies. Bounds decide the speed, never the result."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    floats_ptr += row * FLOATS
    ints_ptr += row * INTS
    maxima_ptr += row * PADDED_TILES
    low = tl.full([], float("-inf"), tl.float32)
    high = tl.full([], float("inf"), tl.float32)
    wide = tl.zeros([], tl.int32)
    if (tl.load(ints_ptr + MODE) == BY_MASS) & (capacity < V):
        p = option(top_p_ptr, row, top_p, tl.float32)
        maxima = tl.load(maxima_ptr + tl.arange(0, PADDED_TILES))
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low, high, number = _mass_bounds(maxima, top, scale, p, logits_ptr + row * logits_stride, maxima_ptr, V, TILE)
        wide = (number > NARROW_ENOUGH).to(tl.int32)
    tl.store(floats_ptr + LOW, low)
    tl.store(floats_ptr + HIGH, high)
    tl.store(ints_ptr + COUNT, 0)
    tl.store(ints_ptr + WIDE, wide)
    tl.store(counts_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def cut_kernel(
    masses_ptr,
    floats_ptr,
    ints_ptr,
    sums_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    logits_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Finds the exact cut of a row among its candidates and adds those kept to the masses of their tiles."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    floats_ptr += row * FLOATS
    ints_ptr += row * INTS
    mode = tl.load(ints_ptr + MODE)
    if mode == BY_MASS:
        logits_ptr += row * logits_stride
        masses_ptr += row * PADDED_TILES
        candidates_ptr += row * capacity
        candidate_ids_ptr += row * capacity
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low = tl.load(floats_ptr + USED_LOW)
        high = tl.load(floats_ptr + USED_HIGH)
        length = tl.load(ints_ptr + COUNT)
        listed = length <= capacity
        length = tl.where(listed, length, V)
        sure = tl.load(sums_ptr + row * MASSES + SURE)
        needed = tl.load(sums_ptr + row * MASSES + NEEDED)
        _, mass, _ = past(
            float("-inf"), length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK
        )
        if (sure >= needed) | (sure + mass < needed):
            # The cut is not among the candidates: search the row.
            low = tl.full([], float("-inf"), tl.float32)
            high = tl.full([], float("inf"), tl.float32)
            sure = tl.zeros([], tl.int64)
            length = tl.zeros([], tl.int32) + V
            listed = length < 0
            tl.store(masses_ptr + tl.arange(0, PADDED_TILES), tl.zeros([PADDED_TILES], tl.int64))
            tl.debug_barrier()
        reached = search(
            needed - sure,
            True,
            key_of(low).to(tl.int64),
            key_of(top).to(tl.int64),
            length,
            listed,
            logits_ptr,
            candidates_ptr,
            candidate_ids_ptr,
            low,
            high,
            top,
            scale,
            CHUNK,
        )
        cut = logit_of(reached.to(tl.int32))
        _, mass, ties = past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK)
        weight = tl.maximum(weigh(cut, top, scale), 1)
        kept = (needed - sure - mass + weight - 1) // weight
        cut_id = tl.zeros([], tl.int32) + V
        if kept < ties:
            cut_id = tie_cut(kept, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
        tl.store(floats_ptr + CUT, cut)
        tl.store(ints_ptr + CUT_ID, cut_id)
        for start in range(0, length, CHUNK):
            x, ids, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            weights = weigh(x, top, scale)
            chosen = chosen & ((x > cut) | ((x == cut) & (ids <= cut_id))) & (weights >= smallest)
            tl.atomic_add(masses_ptr + ids // TILE, weights, chosen, sem="relaxed")


@triton.jit
def total_kernel(tile_masses_ptr, ints_ptr, masses_ptr, PADDED_TILES: tl.constexpr, EARLY: tl.constexpr):
    """Adds up what is kept of each row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints_ptr + row * INTS + MODE) >= WHOLE:
        tile_masses = tl.load(tile_masses_ptr + row * PADDED_TILES + tl.arange(0, PADDED_TILES))
        tl.store(masses_ptr + row * MASSES + KEPT, tl.sum(tile_masses))
