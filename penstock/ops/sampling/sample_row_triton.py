"""The step of `sample` after its pass over the logits: one program a row.

Top-p and min-p keep a run of the order from its first id on. So of several turns only those can be kept whose id stands before
the ids of all turns before them: the records, 2.7 of 8 turns on average. Four turns leave a row open with a chance of
(1 - p)**4, four records of a flat row with that of a product of four uniforms above p: 5e-6 for 1e-4 at p = 0.9, 0.01 for 0.06
at p = 0.5, where the eight turns are counted in.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling._state_triton import (
    BY_MASS,
    CERTAIN,
    COUNTED,
    CUT,
    CUT_ID,
    DENSE,
    FIRST_SURE,
    FLOATS,
    INTS,
    KEPT,
    MASSES,
    MODE,
    NEEDED,
    PENDING,
    SCALE,
    SLOTS,
    SURE,
    TOP,
    WHOLE,
)
from penstock.ops.sampling._weights_triton import at_least, clean, option, random_words, scale_of, smallest_weight, weigh
from penstock.ops.sampling.sample_top_k_triton import PAIRS, count_bound, list_candidates, select_pairs, select_searching
from penstock.ops.sampling.sample_turns_triton import STREAM, draw_turns, masses_of_tiles, words_of_turns

# Turns that are drawn at once.
TURNS = tl.constexpr(8)
ALL = tl.constexpr(2**62)


@triton.jit
def _records(ids, x, good):
    """Which turns may be the first kept: good ones whose id stands before those of all good turns before them."""
    turns = tl.arange(0, TURNS)
    not_after = (x[:, None] > x[None, :]) | ((x[:, None] == x[None, :]) & (ids[:, None] <= ids[None, :]))
    beats = not_after & (turns[:, None] < turns[None, :]) & good[:, None]
    return good & (tl.sum(beats.to(tl.int32), axis=0) == 0)


@triton.jit
def _mass_bounds(x, maxima, factors, tile_masses, PADDED_TILES: tl.constexpr):
    """Bounds of the mass of what stands not after records, from whole tiles.

    A tile's mass and the weights of its ids in the row differ by 2**-15 at most, whence 2**-13, and by one an id.
    """
    most = tl.sum(tl.where(maxima[None, :] >= x[:, None], tile_masses[None, :], 0), axis=1)
    least = tl.sum(tl.where(maxima[None, :] > x[:, None], factors[None, :], 0), axis=1)
    return least, most + (most >> 13) + 256 * PADDED_TILES


@triton.jit(do_not_specialize=["top_k"])
def row_kernel(
    out_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    maxima_ptr,
    sums_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    tile_list_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    temperature,
    top_k,
    top_p,
    min_p,
    V,
    logits_stride,
    capacity,
    MAY_DRAW: tl.constexpr,
    MAY_CUT_BY_COUNT: tl.constexpr,
    MAY_BE_WHOLE: tl.constexpr,
    MAY_PEND: tl.constexpr,
    FILTERS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Draws for greedy rows, rows without filters and rows at top-k; of rows at top-p or min-p those that tiles decide.

    With FILTERS the state also says what the filters are, the cut and mass of rows at top-k, and what top-p asks for.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    heat = option(temperature_ptr, row, temperature, tl.float32)
    if MAY_DRAW:
        # What the pass over the logits does not write is read while it runs.
        k = option(top_k_ptr, row, top_k, tl.int32)
        p = option(top_p_ptr, row, top_p, tl.float32)
        floor = option(min_p_ptr, row, min_p, tl.float32)
        seed = tl.load(seeds_ptr + row)
        offset = tl.load(offsets_ptr + row)
        scale = scale_of(tl.where(heat > 0, heat, 1.0))
        if MAY_CUT_BY_COUNT:
            bits, _more = random_words(seed, offset, STREAM, tl.zeros([], tl.int32))
        if MAY_BE_WHOLE:
            first_words, second_words = words_of_turns(0, seed, offset, TURNS if MAY_PEND else 1)
    if EARLY:
        gdc_wait()
    logits_ptr += row * logits_stride
    tiles = tl.arange(0, PADDED_TILES)
    maxima = tl.load(maxima_ptr + row * PADDED_TILES + tiles)
    top = tl.max(maxima)
    pending = tl.zeros([], tl.int32)
    if MAY_PEND or FILTERS:
        floats_ptr += row * FLOATS
        ints_ptr += row * INTS
        masses_ptr += row * MASSES
    if (heat == 0) | (top == float("-inf")):
        tile = tl.min(tl.where(maxima == top, tiles, PADDED_TILES))
        columns = tile * TILE + tl.arange(0, TILE)
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        tl.store(out_ptr + row, tl.min(tl.where(x == top, columns, V)))
        if FILTERS:
            tl.store(ints_ptr + MODE, CERTAIN)
    elif MAY_DRAW:
        smallest = smallest_weight(floor)
        if FILTERS:
            tl.store(floats_ptr + TOP, top)
            tl.store(floats_ptr + SCALE, scale)
        if (k > 0) & (k < V):
            if MAY_CUT_BY_COUNT:
                candidates_ptr += row * capacity
                candidate_ids_ptr += row * capacity
                low = count_bound(maxima, top, k)
                number = list_candidates(
                    maxima,
                    low,
                    logits_ptr,
                    candidates_ptr,
                    candidate_ids_ptr,
                    tile_list_ptr + row * PADDED_TILES,
                    V,
                    capacity,
                    PADDED_TILES,
                    TILE,
                )
                if number <= PAIRS:
                    drawn, cut, cut_id, mass = select_pairs(
                        number, k, p, smallest, bits, top, scale, candidates_ptr, candidate_ids_ptr
                    )
                else:
                    drawn, cut, cut_id, mass = select_searching(
                        number,
                        k,
                        p,
                        smallest,
                        bits,
                        low,
                        top,
                        scale,
                        V,
                        capacity,
                        logits_ptr,
                        candidates_ptr,
                        candidate_ids_ptr,
                    )
                tl.store(out_ptr + row, drawn)
                if FILTERS:
                    tl.store(ints_ptr + MODE, COUNTED)
                    tl.store(floats_ptr + CUT, cut)
                    tl.store(ints_ptr + CUT_ID, cut_id)
                    tl.store(masses_ptr + KEPT, mass)
        elif MAY_BE_WHOLE:
            tile_masses = masses_of_tiles(maxima, tl.load(sums_ptr + row * PADDED_TILES + tiles), top, scale)
            total = tl.sum(tile_masses)
            ids, x, ties = draw_turns(first_words, second_words, tl.cumsum(tile_masses), total, scale, logits_ptr, V, TILE)
            needed = tl.full([], ALL, tl.int64)
            if MAY_PEND:  # noqa: SIM102
                if p < 1:
                    needed = at_least(p, total)
            if FILTERS:
                tl.store(ints_ptr + MODE, tl.where(p < 1, BY_MASS, WHOLE))
                tl.store(floats_ptr + CUT, float("-inf"))
                tl.store(ints_ptr + CUT_ID, V)
                tl.store(masses_ptr + NEEDED, needed)
                tl.store(masses_ptr + KEPT, 0)
                tl.store(masses_ptr + SURE, 0)
                tl.store(masses_ptr + FIRST_SURE, 0)
            if MAY_PEND:
                weights = weigh(x, top, scale)
                # A row without filters keeps even what weighs nothing.
                record = _records(ids, x, weights >= tl.where((p < 1) | (floor > 0), smallest, 0))
                place = tl.cumsum(record.to(tl.int32)) - 1
                slots = tl.arange(0, SLOTS)
                at = record[None, :] & (place[None, :] == slots[:, None])
                filled = tl.sum(at.to(tl.int32), axis=1) > 0
                slot_ids = tl.sum(tl.where(at, ids[None, :], 0), axis=1)
                slot_x = tl.where(filled, tl.sum(tl.where(at, x[None, :], 0.0), axis=1), float("inf"))
                slot_turns = tl.sum(tl.where(at, tl.arange(0, TURNS)[None, :], 0), axis=1)
                own = tl.sum(tl.where(at, weights[None, :], 0), axis=1)
                least, most = _mass_bounds(slot_x, maxima, weigh(maxima, top, scale), tile_masses, PADDED_TILES)
                dropped = (filled == 0) | (least >= needed)
                kept = filled & (most - own < needed)
                open_slot = tl.min(tl.where(dropped, SLOTS, slots))
                tl.store(out_ptr + row, tl.sum(tl.where(slots == open_slot, slot_ids, 0)))
                pending = 1 - tl.sum((kept & (slots == open_slot)).to(tl.int32))
                if pending != 0:
                    lowest = tl.min(slot_x)
                    dense = tl.sum((maxima >= lowest).to(tl.int32)) * TILE * 2 > V
                    own_ties = tl.sum(tl.where(at, (ties * weights)[None, :], 0), axis=1)
                    tl.store(floats_ptr + slots, slot_x)
                    tl.store(floats_ptr + TOP, top)
                    tl.store(floats_ptr + SCALE, scale)
                    tl.store(ints_ptr + slots, tl.where(filled, slot_ids, -1))
                    tl.store(ints_ptr + SLOTS + slots, slot_turns)
                    tl.store(ints_ptr + DENSE, dense.to(tl.int32))
                    tl.store(masses_ptr + slots, own_ties)
                    tl.store(masses_ptr + NEEDED, needed)
            else:
                tl.store(out_ptr + row, tl.sum(ids))
    if MAY_PEND:
        tl.store(ints_ptr + PENDING, pending)
