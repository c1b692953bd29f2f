"""The passes of `sample` over whole rows: many programs a row, each over some of its tiles."""

import triton
import triton.language as tl

from penstock.ops.sampling._weights_triton import clean, option, smallest_weight, weigh

# Slots of a row's state. Floats: largest logit, scale, first bounds of the candidates (low <= logit < high), last logit kept,
# and the bounds that the gathering pass used.
TOP = tl.constexpr(0)
SCALE = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
CUT = tl.constexpr(4)
USED_LOW = tl.constexpr(5)
USED_HIGH = tl.constexpr(6)
FLOATS = tl.constexpr(8)
# Integers: what is left to do, number of candidates, last id kept at the cut, whether the first bounds are too wide.
MODE = tl.constexpr(0)
COUNT = tl.constexpr(1)
CUT_ID = tl.constexpr(2)
WIDE = tl.constexpr(3)
INTS = tl.constexpr(4)
# Masses: above the candidates and of the whole row, from the gathering pass and from the narrowing one.
SURE = tl.constexpr(0)
TOTAL = tl.constexpr(1)
FIRST_SURE = tl.constexpr(2)
FIRST_TOTAL = tl.constexpr(3)
MASSES = tl.constexpr(4)
# Modes: the id is known; nothing is cut; cut by top-k, whose candidates are all that may be kept; cut by top-p alone.
DONE = tl.constexpr(0)
PLAIN = tl.constexpr(1)
BY_COUNT = tl.constexpr(2)
BY_MASS = tl.constexpr(3)
BINS = tl.constexpr(64)


@triton.jit
def maxima_kernel(
    maxima_ptr,
    logits_ptr,
    V,
    logits_stride,
    blocks,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest logit of every tile; -inf for tiles past the row's end."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    first = tl.program_id(1) * blocks
    for block in range(first, first + blocks):
        tiles = block * TILES + tl.arange(0, TILES)
        columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        tl.store(maxima_ptr + row * PADDED_TILES + tiles, tl.max(x, axis=1), tiles < PADDED_TILES)


@triton.jit
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
):
    """Rows with wide bounds: how many ids fall in each of the equal parts of the bounds, and the masses above and in all."""
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
        total = tl.zeros([BLOCK], tl.int64)
        counts = tl.zeros([BINS], tl.int32)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < V
            x = clean(tl.load(logits_ptr + columns, inside, other=float("-inf")))
            weights = tl.where(inside, weigh(x, top, scale), 0)
            total += weights
            sure += tl.where(x >= high, weights, 0)
            between = inside & (x >= low) & (x < high)
            bins = tl.minimum(tl.maximum((start - x) * per_bin, 0.0), BINS - 1.0).to(tl.int32)
            counts += tl.histogram(bins, BINS, mask=between)
        tl.atomic_add(counts_ptr + row * BINS + tl.arange(0, BINS), counts, sem="relaxed")
        tl.atomic_add(sums_ptr + row * MASSES + FIRST_SURE, tl.sum(sure), sem="relaxed")
        tl.atomic_add(sums_ptr + row * MASSES + FIRST_TOTAL, tl.sum(total), sem="relaxed")


@triton.jit
def _narrowed(low, high, top, scale, p, counts_ptr, sums_ptr):
    """Tighter bounds of the cut: the mass of a part lies between its number of ids at its lowest and at its highest weight."""
    start = tl.minimum(high, top)
    width = (start - low) / BINS
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins).to(tl.float32)
    one = 1099511627776.0
    heaviest = tl.exp2((start - bins * width - top) * scale) * one
    lightest = tl.exp2((start - (bins + 1) * width - top) * scale) * one
    sure = tl.load(sums_ptr + FIRST_SURE).to(tl.float32)
    needed = tl.load(sums_ptr + FIRST_TOTAL).to(tl.float32) * p
    # The slack covers float32 sums.
    first = tl.min(tl.where(sure + tl.cumsum(counts * heaviest) >= needed * 0.99999, bins, BINS))
    last = tl.min(tl.where(sure + tl.cumsum(counts * lightest) >= needed * 1.00001, bins, BINS))
    tight_high = tl.where(first > 0, start - first * width, high)
    tight_low = tl.where(last < BINS - 1, start - (last + 1) * width, low)
    return tight_low, tight_high


@triton.jit
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
    top_p_ptr,
    min_p_ptr,
    top_p,
    min_p,
    V,
    logits_stride,
    blocks,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Collects the candidates of a row in any order, and the exact masses of the tiles above them."""
    row = tl.program_id(0).to(tl.int64)
    mode = tl.load(ints_ptr + row * INTS + MODE)
    if mode != DONE:
        logits_ptr += row * logits_stride
        maxima_ptr += row * PADDED_TILES
        masses_ptr += row * PADDED_TILES
        floats_ptr += row * FLOATS
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        low = tl.load(floats_ptr + LOW)
        high = tl.load(floats_ptr + HIGH)
        if tl.load(ints_ptr + row * INTS + WIDE) != 0:
            p = option(top_p_ptr, row, top_p, tl.float32)
            low, high = _narrowed(low, high, top, scale, p, counts_ptr + row * BINS, sums_ptr + row * MASSES)
        if tl.program_id(1) == 0:
            tl.store(floats_ptr + USED_LOW, low)
            tl.store(floats_ptr + USED_HIGH, high)
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        weighs = mode != BY_COUNT
        sure = tl.zeros([TILES], tl.int64)
        total = tl.zeros([TILES], tl.int64)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            tiles = block * TILES + tl.arange(0, TILES)
            largest = tl.load(maxima_ptr + tiles, tiles < PADDED_TILES, other=float("-inf"))
            wanted = weighs | (largest >= low)
            mass = tl.zeros([TILES], tl.int64)
            if tl.max(wanted.to(tl.int32)) > 0:
                columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
                inside = (columns < V) & wanted[:, None]
                x = clean(tl.load(logits_ptr + columns, inside, other=float("-inf")))
                if weighs:
                    weights = tl.where(inside, weigh(x, top, scale), 0)
                    above = tl.where(x >= high, weights, 0)
                    mass = tl.sum(tl.where(above >= smallest, above, 0), axis=1)
                    sure += tl.sum(above, axis=1)
                    total += tl.sum(weights, axis=1)
                chosen = inside & (x >= low) & (x < high)
                found = tl.sum(tl.sum(chosen.to(tl.int32), axis=1))
                if found > 0:
                    base = tl.atomic_add(ints_ptr + row * INTS + COUNT, found, sem="relaxed")
                    flags = tl.reshape(chosen.to(tl.int32), [TILES * TILE])
                    slots = base + tl.reshape(tl.cumsum(flags) - flags, [TILES, TILE])
                    writes = chosen & (slots < capacity)
                    tl.store(candidates_ptr + row * capacity + slots, x, writes)
                    tl.store(candidate_ids_ptr + row * capacity + slots, columns, writes)
            tl.store(masses_ptr + tiles, mass, tiles < PADDED_TILES)
        if mode == BY_MASS:
            tl.atomic_add(sums_ptr + row * MASSES + SURE, tl.sum(sure), sem="relaxed")
            tl.atomic_add(sums_ptr + row * MASSES + TOTAL, tl.sum(total), sem="relaxed")
