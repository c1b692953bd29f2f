"""Draws from the whole row until one is kept by top-p and min-p."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling import _weights
from penstock.ops.sampling._philox import SAMPLE_STREAM
from penstock.ops.sampling._search_triton import cut_by_mass, draw_kept
from penstock.ops.sampling._weights_triton import clean, key_of, option, random_words, smallest_weight, weigh
from penstock.ops.sampling.sample_scan_triton import FLOATS, INTS, MASSES, NEEDED, PENDING, SCALE, TOP

STREAM = tl.constexpr(SAMPLE_STREAM)
ALL_TURNS = tl.constexpr(_weights.TURNS)
# Turns that one pass over the logits decides.
TURNS = tl.constexpr(4)
CHUNK = tl.constexpr(1024)


@triton.jit
def masses_of_tiles(maxima, sums, top, scale):
    """sums · weights of the maxima >> 40, as the high half of a product of 64-bit integers."""
    factors = weigh(maxima, top, scale)
    return tl.umulhi((sums << 12).to(tl.uint64), (factors << 12).to(tl.uint64)).to(tl.int64)


@triton.jit
def words_of_turns(first, seed, offset, NUMBER: tl.constexpr):
    """The random words of NUMBER turns."""
    zero = tl.zeros([NUMBER], tl.int64)
    return random_words(zero + seed, zero + offset, STREAM, first + tl.arange(0, NUMBER))


@triton.jit
def draw_turns(bits, more, cumulative, total, scale, logits_ptr, V, TILE: tl.constexpr):
    """(ids, their logits, equal logits before each in its tile) of turns: a tile by its mass, then an id in it."""
    target = tl.umulhi(bits, tl.zeros_like(bits) + total.to(tl.uint64)).to(tl.int64)
    tile = tl.sum((cumulative[None, :] <= target[:, None]).to(tl.int32), axis=1)
    columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
    weights = weigh(x, tl.max(x, axis=1)[:, None], scale)
    inner = tl.umulhi(more, tl.sum(weights, axis=1).to(tl.uint64)).to(tl.int64)
    ids = tile * TILE + tl.sum((tl.cumsum(weights, axis=1) <= inner[:, None]).to(tl.int32), axis=1)
    logits = tl.sum(tl.where(columns == ids[:, None], x, 0.0), axis=1)
    ties = tl.sum(((x == logits[:, None]) & (columns < ids[:, None])).to(tl.int32), axis=1)
    return ids, logits, ties


@triton.jit
def _weight_before(weights, x, columns, drawn_x, drawn_id):
    """The weights of what stands before the drawn id in the order."""
    return tl.where((x > drawn_x) | ((x == drawn_x) & (columns < drawn_id)), weights, 0)


@triton.jit(do_not_specialize=["blocks"])
def check_kernel(
    before_ptr,
    drawn_ids_ptr,
    drawn_x_ptr,
    floats_ptr,
    ints_ptr,
    maxima_ptr,
    logits_ptr,
    V,
    logits_stride,
    blocks,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Adds up the masses before each of the row's first drawn ids."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints_ptr + row * INTS + PENDING) != 0:
        logits_ptr += row * logits_stride
        maxima_ptr += row * PADDED_TILES
        top = tl.load(floats_ptr + row * FLOATS + TOP)
        scale = tl.load(floats_ptr + row * FLOATS + SCALE)
        drawn_x_ptr += row * TURNS
        drawn_ids_ptr += row * TURNS
        x0, x1, x2, x3 = tl.load(drawn_x_ptr), tl.load(drawn_x_ptr + 1), tl.load(drawn_x_ptr + 2), tl.load(drawn_x_ptr + 3)
        id0, id1 = tl.load(drawn_ids_ptr), tl.load(drawn_ids_ptr + 1)
        id2, id3 = tl.load(drawn_ids_ptr + 2), tl.load(drawn_ids_ptr + 3)
        lowest = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
        before0 = tl.zeros([TILES, TILE], tl.int64)
        before1 = tl.zeros([TILES, TILE], tl.int64)
        before2 = tl.zeros([TILES, TILE], tl.int64)
        before3 = tl.zeros([TILES, TILE], tl.int64)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            tiles = block * TILES + tl.arange(0, TILES)
            largest = tl.load(maxima_ptr + tiles, tiles < PADDED_TILES, other=float("-inf"))
            if tl.max(largest) >= lowest:
                columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
                x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
                weights = weigh(x, top, scale)
                before0 += _weight_before(weights, x, columns, x0, id0)
                before1 += _weight_before(weights, x, columns, x1, id1)
                before2 += _weight_before(weights, x, columns, x2, id2)
                before3 += _weight_before(weights, x, columns, x3, id3)
        before_ptr += row * TURNS
        tl.atomic_add(before_ptr, tl.sum(tl.sum(before0, axis=1)), sem="relaxed")
        tl.atomic_add(before_ptr + 1, tl.sum(tl.sum(before1, axis=1)), sem="relaxed")
        tl.atomic_add(before_ptr + 2, tl.sum(tl.sum(before2, axis=1)), sem="relaxed")
        tl.atomic_add(before_ptr + 3, tl.sum(tl.sum(before3, axis=1)), sem="relaxed")


@triton.jit
def decide_kernel(
    out_ptr,
    before_ptr,
    drawn_ids_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    maxima_ptr,
    sums_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Takes the first turn whose id is kept; where the first few have none, goes on alone over the row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints_ptr + row * INTS + PENDING) != 0:
        turns = tl.arange(0, TURNS)
        needed = tl.load(masses_ptr + row * MASSES + NEEDED)
        ids = tl.load(drawn_ids_ptr + row * TURNS + turns)
        kept = (ids >= 0) & (tl.load(before_ptr + row * TURNS + turns) < needed)
        turn = tl.min(tl.where(kept, turns, TURNS))
        drawn = tl.sum(tl.where(turns == turn, ids, 0))
        if turn == TURNS:
            logits_ptr += row * logits_stride
            top = tl.load(floats_ptr + row * FLOATS + TOP)
            scale = tl.load(floats_ptr + row * FLOATS + SCALE)
            seed = tl.load(seeds_ptr + row)
            offset = tl.load(offsets_ptr + row)
            smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
            tiles = tl.arange(0, PADDED_TILES)
            maxima = tl.load(maxima_ptr + row * PADDED_TILES + tiles)
            masses = masses_of_tiles(maxima, tl.load(sums_ptr + row * PADDED_TILES + tiles), top, scale)
            cumulative = tl.cumsum(masses)
            total = tl.sum(masses)
            going = True
            while going:
                bits, more = words_of_turns(turn, seed, offset, 1)
                found, found_x, _ties = draw_turns(bits, more, cumulative, total, scale, logits_ptr, V, TILE)
                drawn = tl.sum(found)
                drawn_x = tl.sum(found_x)
                turn += 1
                mass = tl.zeros([CHUNK], tl.int64)
                accepted = weigh(drawn_x, top, scale) >= smallest
                if accepted:
                    for start in range(0, V, CHUNK):
                        columns = start + tl.arange(0, CHUNK)
                        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
                        mass += _weight_before(weigh(x, top, scale), x, columns, drawn_x, drawn)
                    accepted = tl.sum(mass) < needed
                going = (accepted == 0) & (turn < ALL_TURNS)
                turn = tl.where(accepted, ALL_TURNS + 1, turn)
            if turn == ALL_TURNS:
                bits, _ = random_words(seed, offset, STREAM, turn)
                low = tl.full([], float("-inf"), tl.float32)
                high = tl.full([], float("inf"), tl.float32)
                length = tl.zeros([], tl.int32) + V
                # There is no list of candidates: the pointers to one are never read.
                cut, cut_id = cut_by_mass(
                    needed,
                    key_of(low).to(tl.int64),
                    V,
                    length,
                    length < 0,
                    logits_ptr,
                    floats_ptr,
                    ints_ptr,
                    low,
                    high,
                    top,
                    scale,
                    CHUNK,
                )
                drawn, _ = draw_kept(
                    bits,
                    smallest,
                    cut,
                    cut_id,
                    V,
                    length,
                    length < 0,
                    logits_ptr,
                    floats_ptr,
                    ints_ptr,
                    low,
                    high,
                    top,
                    scale,
                    CHUNK,
                )
        tl.store(out_ptr + row, drawn)
