"""The steps of `sample` between its passes: one program a row."""

import triton
import triton.language as tl

from penstock.ops.sampling._philox import SAMPLE_STREAM
from penstock.ops.sampling._weights_triton import (
    at_least,
    clean,
    key_of,
    logit_of,
    option,
    random_words,
    scale_of,
    smallest_weight,
    weigh,
)
from penstock.ops.sampling.sample_scan_triton import (
    BINS,
    BY_COUNT,
    BY_MASS,
    COUNT,
    CUT,
    CUT_ID,
    DONE,
    FLOATS,
    HIGH,
    INTS,
    LOW,
    MASSES,
    MODE,
    PLAIN,
    SCALE,
    SURE,
    TOP,
    TOTAL,
    USED_HIGH,
    USED_LOW,
    WIDE,
)

STREAM = tl.constexpr(SAMPLE_STREAM)
SAMPLES = tl.constexpr(4096)
STEPS = tl.constexpr(512)
NARROW_ENOUGH = tl.constexpr(2048)
DEVIATIONS = tl.constexpr(4.0)
MARGIN = tl.constexpr(128.0)


@triton.jit
def _count_bound(maxima, k):
    """A logit that at least k tiles reach, hence at least k ids: near the k-th largest of the tiles' maxima."""
    keys = key_of(maxima)
    low = key_of(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low = tl.where(reach >= k, middle, low)
        # A bound that few more than k ids reach is as good as the best one.
        high = tl.where(reach >= k, tl.where(reach <= k + k // 8, middle + 1, high), middle)
    return logit_of(low.to(tl.int32))


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
def bracket_kernel(
    out_ptr,
    floats_ptr,
    ints_ptr,
    sums_ptr,
    counts_ptr,
    maxima_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    temperature,
    top_k,
    top_p,
    V,
    logits_stride,
    capacity,
    MAY_CUT_BY_MASS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finishes greedy rows; tells the others where their candidates lie. Bounds decide the speed, never the result."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    floats_ptr += row * FLOATS
    ints_ptr += row * INTS
    heat = option(temperature_ptr, row, temperature, tl.float32)
    k = option(top_k_ptr, row, top_k, tl.int32)
    p = option(top_p_ptr, row, top_p, tl.float32)
    tiles = tl.arange(0, PADDED_TILES)
    maxima_ptr += row * PADDED_TILES
    maxima = tl.load(maxima_ptr + tiles)
    top = tl.max(maxima)
    if (heat == 0) | (top == float("-inf")):
        tile = tl.min(tl.where(maxima == top, tiles, PADDED_TILES))
        columns = tile * TILE + tl.arange(0, TILE)
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        tl.store(out_ptr + row, tl.min(tl.where(x == top, columns, V)))
        tl.store(ints_ptr + MODE, DONE)
        tl.store(ints_ptr + WIDE, 0)
    else:
        scale = scale_of(heat)
        counts = (k > 0) & (k < V)
        low = tl.full([], float("inf"), tl.float32)
        high = tl.full([], float("-inf"), tl.float32)
        mode = tl.full([], PLAIN, tl.int32)
        wide = tl.zeros([], tl.int32)
        if counts | (p < 1):
            mode = tl.where(counts, BY_COUNT, BY_MASS)
            low = tl.full([], float("-inf"), tl.float32)
            high = tl.full([], float("inf"), tl.float32)
            if capacity < V:
                if counts:
                    low = _count_bound(maxima, k)
                elif MAY_CUT_BY_MASS:
                    low, high, number = _mass_bounds(maxima, top, scale, p, logits_ptr, maxima_ptr, V, TILE)
                    wide = (number > NARROW_ENOUGH).to(tl.int32)
        tl.store(floats_ptr + TOP, top)
        tl.store(floats_ptr + SCALE, scale)
        tl.store(floats_ptr + LOW, low)
        tl.store(floats_ptr + HIGH, high)
        tl.store(floats_ptr + CUT, float("-inf"))
        tl.store(ints_ptr + MODE, mode)
        tl.store(ints_ptr + COUNT, 0)
        tl.store(ints_ptr + CUT_ID, V)
        tl.store(ints_ptr + WIDE, wide)
        tl.store(sums_ptr + row * MASSES + tl.arange(0, MASSES), tl.zeros([MASSES], tl.int64))
        if MAY_CUT_BY_MASS:
            tl.store(counts_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def _elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK: tl.constexpr):
    """A chunk of the candidates, or of the row where the list of candidates is no use: (logits, ids, which are candidates)."""
    slots = start + tl.arange(0, CHUNK)
    inside = slots < length
    near = tl.load(candidates_ptr + slots, inside & listed, other=float("-inf"))
    far = clean(tl.load(logits_ptr + slots, inside & (listed == 0), other=float("-inf")))
    ids = tl.where(listed, tl.load(candidate_ids_ptr + slots, inside & listed, other=0), slots)
    x = tl.where(listed, near, far)
    return x, ids, inside & (x >= low) & (x < high)


@triton.jit
def _search(
    enough,
    by_mass: tl.constexpr,
    reached,
    upper,
    length,
    listed,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    low,
    high,
    top,
    scale,
    CHUNK: tl.constexpr,
):
    """The largest key from which the candidates on are enough, in number or mass; they are from `reached` on.

    Halves the interval of keys and draws its ends in to keys that occur.
    """
    while reached < upper:
        pivot = reached + (upper - reached + 1) // 2
        amount = tl.zeros([CHUNK], tl.int64)
        lowest = tl.zeros([CHUNK], tl.int64) + upper
        highest = tl.zeros([CHUNK], tl.int64) + reached
        for start in range(0, length, CHUNK):
            x, _, chosen = _elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            keys = key_of(x).to(tl.int64)
            above = chosen & (keys >= pivot)
            if by_mass:
                amount += tl.where(above, weigh(x, top, scale), 0)
            else:
                amount += above.to(tl.int64)
            lowest = tl.where(above, tl.minimum(lowest, keys), lowest)
            highest = tl.where(chosen & (keys < pivot), tl.maximum(highest, keys), highest)
        if tl.sum(amount) >= enough:
            reached = tl.min(lowest)
        else:
            upper = tl.max(highest)
    return reached


@triton.jit
def _past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK: tl.constexpr):
    """Number and mass of the candidates past the cut, and number at it."""
    number = tl.zeros([CHUNK], tl.int32)
    ties = tl.zeros([CHUNK], tl.int32)
    mass = tl.zeros([CHUNK], tl.int64)
    for start in range(0, length, CHUNK):
        x, _, chosen = _elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
        past = chosen & (x > cut)
        number += past.to(tl.int32)
        ties += (chosen & (x == cut)).to(tl.int32)
        mass += tl.where(past, weigh(x, top, scale), 0)
    return tl.sum(number), tl.sum(mass), tl.sum(ties)


@triton.jit
def _tie_cut(wanted, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK: tl.constexpr):
    """The id up to which `wanted` candidates have the logit `cut`."""
    below = tl.full([], -1, tl.int32)
    last = tl.zeros([], tl.int32) + V
    while last - below > 1:
        middle = below + (last - below) // 2
        number = tl.zeros([CHUNK], tl.int32)
        for start in range(0, length, CHUNK):
            x, ids, chosen = _elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            number += (chosen & (x == cut) & (ids <= middle)).to(tl.int32)
        enough = tl.sum(number) >= wanted
        last = tl.where(enough, middle, last)
        below = tl.where(enough, below, middle)
    return last


@triton.jit
def cut_kernel(
    masses_ptr,
    floats_ptr,
    ints_ptr,
    sums_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    logits_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k,
    top_p,
    min_p,
    V,
    logits_stride,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Finds the exact cut of a row among its candidates and adds those kept to the masses of their tiles."""
    row = tl.program_id(0).to(tl.int64)
    floats_ptr += row * FLOATS
    ints_ptr += row * INTS
    mode = tl.load(ints_ptr + MODE)
    if mode >= BY_COUNT:
        logits_ptr += row * logits_stride
        masses_ptr += row * PADDED_TILES
        candidates_ptr += row * capacity
        candidate_ids_ptr += row * capacity
        k = option(top_k_ptr, row, top_k, tl.int32)
        p = option(top_p_ptr, row, top_p, tl.float32)
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low = tl.load(floats_ptr + USED_LOW)
        high = tl.load(floats_ptr + USED_HIGH)
        length = tl.load(ints_ptr + COUNT)
        listed = length <= capacity
        length = tl.where(listed, length, V)
        sure = tl.zeros([], tl.int64)
        needed = tl.zeros([], tl.int64)
        if mode == BY_MASS:
            sure = tl.load(sums_ptr + row * MASSES + SURE)
            needed = at_least(p, tl.load(sums_ptr + row * MASSES + TOTAL))
            _, mass, _ = _past(
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
        reached = key_of(low).to(tl.int64)
        kept = tl.zeros([], tl.int64)
        if mode == BY_COUNT:
            reached = _search(
                k,
                False,
                reached,
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
            number, mass, _ = _past(
                logit_of(reached.to(tl.int32)),
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
            kept = (k - number).to(tl.int64)
            if p < 1:
                needed = at_least(p, mass + kept * weigh(logit_of(reached.to(tl.int32)), top, scale))
        if p < 1:
            reached = _search(
                needed - sure,
                True,
                reached,
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
        _, mass, ties = _past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK)
        if p < 1:
            weight = tl.maximum(weigh(cut, top, scale), 1)
            kept = (needed - sure - mass + weight - 1) // weight
        cut_id = tl.zeros([], tl.int32) + V
        if kept < ties:
            cut_id = _tie_cut(kept, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
        tl.store(floats_ptr + CUT, cut)
        tl.store(ints_ptr + CUT_ID, cut_id)
        for start in range(0, length, CHUNK):
            x, ids, chosen = _elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            weights = weigh(x, top, scale)
            chosen = chosen & ((x > cut) | ((x == cut) & (ids <= cut_id))) & (weights >= smallest)
            tl.atomic_add(masses_ptr + ids // TILE, weights, chosen, sem="relaxed")


@triton.jit
def draw_kernel(
    out_ptr,
    masses_ptr,
    floats_ptr,
    ints_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Inverts the cumulative mass by ascending id: first over tiles, then inside one."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints_ptr + row * INTS + MODE) != DONE:
        floats_ptr += row * FLOATS
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        bits, _ = random_words(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), STREAM)
        tiles = tl.arange(0, PADDED_TILES)
        masses = tl.load(masses_ptr + row * PADDED_TILES + tiles)
        target = tl.umulhi(bits, tl.sum(masses).to(tl.uint64)).to(tl.int64)
        tile = tl.sum((tl.cumsum(masses) <= target).to(tl.int32))
        target -= tl.sum(tl.where(tiles < tile, masses, 0))
        columns = tile * TILE + tl.arange(0, TILE)
        x = clean(tl.load(logits_ptr + row * logits_stride + columns, columns < V, other=float("-inf")))
        weights = weigh(x, tl.load(floats_ptr + TOP), tl.load(floats_ptr + SCALE))
        cut = tl.load(floats_ptr + CUT)
        kept = (x > cut) | ((x == cut) & (columns <= tl.load(ints_ptr + row * INTS + CUT_ID)))
        weights = tl.where(kept & (weights >= smallest), weights, 0)
        tl.store(out_ptr + row, tile * TILE + tl.sum((tl.cumsum(weights) <= target).to(tl.int32)))
