"""Top-p of what sample_row_triton leaves open: the masses before the records, approximately, then the decision.

A float32 sum with a bound of its error decides all but a few rows of 100,000, with half the instructions of integer weights;
where it does not, and where all records are dropped, the row's one program goes on alone with integers.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling._search_triton import cut_by_mass, draw_kept
from penstock.ops.sampling._state_triton import DENSE, FLOATS, INTS, MASSES, NEEDED, PENDING, SCALE, SLOTS, TOP
from penstock.ops.sampling._weights_triton import (
    LARGEST,
    clean,
    key_of,
    logit_of,
    option,
    random_words,
    smallest_weight,
    weigh,
)
from penstock.ops.sampling.sample_scan_triton import columns_of
from penstock.ops.sampling.sample_turns_triton import ALL_TURNS, STREAM, draw_turns, masses_of_tiles, words_of_turns

CHUNK = tl.constexpr(4096)
TWO_40 = tl.constexpr(2.0**40)


@triton.jit
def _limits(x):
    """What a raw logit must exceed to stand before the clean logit x in tiles before its own, and in the others."""
    key = key_of(x) - 1
    # Below zero comes the negative number next to it, not the negative zero.
    below = logit_of(tl.where(key == -1, -2, key))
    return below, tl.where(x == LARGEST, float("inf"), x)


@triton.jit
def _add_before(sums, powers, x, tiles, drawn_tile, below, past):
    """Adds the powers of what stands before a drawn id; ids of its own tile with its logit are counted already."""
    limit = tl.where(tiles < drawn_tile, below, past)
    return sums + tl.sum(tl.where(x > limit[:, None, None], powers, 0.0), axis=1)


@triton.jit
def _store_before(pointer, sums):
    tl.atomic_add(pointer, tl.sum(tl.sum((sums * TWO_40).to(tl.int64), axis=1)), sem="relaxed")


@triton.jit(do_not_specialize=["blocks"])
def check_kernel(
    floats_ptr,
    ints_ptr,
    masses_ptr,
    maxima_ptr,
    logits_ptr,
    V,
    logits_stride,
    blocks,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Adds up the masses before each record of a row, in tiles that hold something as large as the least of them."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    ints_ptr += row * INTS
    if tl.load(ints_ptr + PENDING) != 0:
        floats_ptr += row * FLOATS
        masses_ptr += row * MASSES
        logits_ptr += row * logits_stride
        maxima_ptr += row * PADDED_TILES
        top = tl.load(floats_ptr + TOP)
        scale = tl.load(floats_ptr + SCALE)
        dense = tl.load(ints_ptr + DENSE) != 0
        x0, x1, x2, x3 = tl.load(floats_ptr), tl.load(floats_ptr + 1), tl.load(floats_ptr + 2), tl.load(floats_ptr + 3)
        tile0, tile1 = tl.load(ints_ptr) // TILE, tl.load(ints_ptr + 1) // TILE
        tile2, tile3 = tl.load(ints_ptr + 2) // TILE, tl.load(ints_ptr + 3) // TILE
        below0, past0 = _limits(x0)
        below1, past1 = _limits(x1)
        below2, past2 = _limits(x2)
        below3, past3 = _limits(x3)
        lowest = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
        sums0 = tl.zeros([TILES, PART], tl.float32)
        sums1 = tl.zeros([TILES, PART], tl.float32)
        sums2 = tl.zeros([TILES, PART], tl.float32)
        sums3 = tl.zeros([TILES, PART], tl.float32)
        first = tl.program_id(1) * blocks
        for block in range(first, first + blocks):
            tiles = block * TILES + tl.arange(0, TILES)
            wanted = tiles < PADDED_TILES
            # Loads that wait for the maxima are worth it only where many are spared.
            if dense == 0:
                wanted = tl.load(maxima_ptr + tiles, wanted, other=float("-inf")) >= lowest
            columns = columns_of(tiles, TILE, PART)
            x = tl.load(logits_ptr + columns, wanted[:, None, None] & (columns < V), other=float("-inf")).to(tl.float32)
            # An infinite logit counts as the largest number, which the largest logit is then.
            powers = tl.exp2(tl.minimum((x - top) * scale, 0.0))
            sums0 = _add_before(sums0, powers, x, tiles, tile0, below0, past0)
            sums1 = _add_before(sums1, powers, x, tiles, tile1, below1, past1)
            sums2 = _add_before(sums2, powers, x, tiles, tile2, below2, past2)
            sums3 = _add_before(sums3, powers, x, tiles, tile3, below3, past3)
        _store_before(masses_ptr, sums0)
        _store_before(masses_ptr + 1, sums1)
        _store_before(masses_ptr + 2, sums2)
        _store_before(masses_ptr + 3, sums3)


@triton.jit
def _error(before, terms, V):
    """A bound of the error of a mass before an id: `terms` powers were added in each sum.

    Each addition rounds by 2**-24; a power and its weight differ by 2**-21 (ex2.approx, the polynomial's rounding), for which
    64 stand; and by 1 an id, rounded down, and by 1 a sum.
    """
    return ((before >> 24) + 1) * (terms + 64) + 2 * V + 4096


@triton.jit(do_not_specialize=["terms"])
def decide_kernel(
    out_ptr,
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
    terms,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Takes the first record whose id is kept; where none is for sure, goes on alone over the row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    ints_ptr += row * INTS
    if tl.load(ints_ptr + PENDING) != 0:
        floats_ptr += row * FLOATS
        masses_ptr += row * MASSES
        slots = tl.arange(0, SLOTS)
        needed = tl.load(masses_ptr + NEEDED)
        ids = tl.load(ints_ptr + slots)
        before = tl.load(masses_ptr + slots)
        error = _error(before, terms, V)
        filled = ids >= 0
        dropped = (filled == 0) | (before - error >= needed)
        kept = filled & (before + error < needed)
        open_slot = tl.min(tl.where(dropped, SLOTS, slots))
        drawn = tl.sum(tl.where(slots == open_slot, ids, 0))
        if tl.sum((kept & (slots == open_slot)).to(tl.int32)) == 0:
            turns = tl.load(ints_ptr + SLOTS + slots)
            x = tl.load(floats_ptr + slots)
            # The first id of the order known to be dropped: what does not stand before it is dropped too.
            gone = filled & dropped
            dropped_x = tl.max(tl.where(gone, x, float("-inf")))
            dropped_id = tl.min(tl.where(gone & (x == dropped_x), ids, V))
            # The turn that is unclear, or the one after the last record.
            turn = tl.sum(tl.where(slots == open_slot, turns, 0))
            if open_slot == SLOTS:
                turn = tl.max(tl.where(filled, turns + 1, 0))
            drawn = _draw_alone(
                turn,
                dropped_x,
                dropped_id,
                needed,
                row,
                tl.load(floats_ptr + TOP),
                tl.load(floats_ptr + SCALE),
                floats_ptr,
                ints_ptr,
                maxima_ptr,
                sums_ptr,
                logits_ptr + row * logits_stride,
                seeds_ptr,
                offsets_ptr,
                smallest_weight(option(min_p_ptr, row, min_p, tl.float32)),
                V,
                PADDED_TILES,
                TILE,
            )
        tl.store(out_ptr + row, drawn)


@triton.jit
def _draw_alone(
    turn,
    dropped_x,
    dropped_id,
    needed,
    row,
    top,
    scale,
    floats_ptr,
    ints_ptr,
    maxima_ptr,
    sums_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    smallest,
    V,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The id drawn from a turn on, by one program with integer weights; no turn before it is kept."""
    seed = tl.load(seeds_ptr + row)
    offset = tl.load(offsets_ptr + row)
    tiles = tl.arange(0, PADDED_TILES)
    maxima = tl.load(maxima_ptr + row * PADDED_TILES + tiles)
    masses = masses_of_tiles(maxima, tl.load(sums_ptr + row * PADDED_TILES + tiles), top, scale)
    cumulative = tl.cumsum(masses)
    total = tl.sum(masses)
    drawn = tl.zeros([], tl.int32)
    going = turn < ALL_TURNS
    while going:
        bits, more = words_of_turns(turn, seed, offset, 1)
        ids, logits, _ = draw_turns(bits, more, cumulative, total, scale, logits_ptr, V, TILE)
        drawn = tl.sum(ids)
        drawn_x = tl.sum(logits)
        accepted = (drawn_x > dropped_x) | ((drawn_x == dropped_x) & (drawn < dropped_id))
        accepted = accepted & (weigh(drawn_x, top, scale) >= smallest)
        if accepted:
            mass = tl.zeros([CHUNK], tl.int64)
            for start in range(0, V, CHUNK):
                columns = start + tl.arange(0, CHUNK)
                x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
                is_before = (x > drawn_x) | ((x == drawn_x) & (columns < drawn))
                mass += tl.where(is_before, weigh(x, top, scale), 0)
            accepted = tl.sum(mass) < needed
            dropped_x = drawn_x
            dropped_id = drawn
        going = (accepted == 0) & (turn < ALL_TURNS - 1)
        turn = tl.where(accepted, ALL_TURNS + 1, turn + 1)
    if turn == ALL_TURNS:
        bits, _ = random_words(seed, offset, STREAM, turn)
        low = tl.full([], float("-inf"), tl.float32)
        high = tl.full([], float("inf"), tl.float32)
        length = tl.zeros([], tl.int32) + V
        # There is no list of candidates: the pointers to one are never read.
        listed = length < 0
        reached = key_of(low).to(tl.int64)
        lists = (logits_ptr, floats_ptr, ints_ptr, low, high, top, scale)
        cut, cut_id = cut_by_mass(needed, reached, V, length, listed, *lists, CHUNK)
        drawn, _ = draw_kept(bits, smallest, cut, cut_id, V, length, listed, *lists, CHUNK)
    return drawn
