"""The first step of `sample` after its pass over the logits: one program a row."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.ops.sampling._weights_triton import at_least, clean, option, random_words, scale_of, smallest_weight, weigh
from penstock.ops.sampling.sample_scan_triton import (
    BY_MASS,
    CERTAIN,
    COUNT,
    COUNTED,
    CUT,
    CUT_ID,
    FLOATS,
    INTS,
    KEPT,
    MASSES,
    MODE,
    NEEDED,
    PENDING,
    SCALE,
    TOP,
    WHOLE,
)
from penstock.ops.sampling.sample_select_triton import PAIRS, count_bound, list_candidates, select_pairs, select_searching
from penstock.ops.sampling.sample_turns_triton import STREAM, TURNS, draw_turns, masses_of_tiles, words_of_turns


@triton.jit
def row_kernel(
    out_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    before_ptr,
    drawn_ids_ptr,
    drawn_x_ptr,
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
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Draws for greedy rows, rows without filters and rows at top-k; draws the first turns of rows at top-p or min-p."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    heat = option(temperature_ptr, row, temperature, tl.float32)
    tiles = tl.arange(0, PADDED_TILES)
    maxima_ptr += row * PADDED_TILES
    maxima = tl.load(maxima_ptr + tiles)
    top = tl.max(maxima)
    if (heat == 0) | (top == float("-inf")):
        tile = tl.min(tl.where(maxima == top, tiles, PADDED_TILES))
        columns = tile * TILE + tl.arange(0, TILE)
        x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
        tl.store(out_ptr + row, tl.min(tl.where(x == top, columns, V)))
        if MAY_DRAW:
            tl.store(ints_ptr + row * INTS + MODE, CERTAIN)
            tl.store(ints_ptr + row * INTS + PENDING, 0)
    elif MAY_DRAW:
        floats_ptr += row * FLOATS
        ints_ptr += row * INTS
        masses_ptr += row * MASSES
        k = option(top_k_ptr, row, top_k, tl.int32)
        p = option(top_p_ptr, row, top_p, tl.float32)
        floor = option(min_p_ptr, row, min_p, tl.float32)
        scale = scale_of(heat)
        seed = tl.load(seeds_ptr + row)
        offset = tl.load(offsets_ptr + row)
        counts = (k > 0) & (k < V)
        cut = tl.full([], float("-inf"), tl.float32)
        cut_id = tl.zeros([], tl.int32) + V
        kept = tl.zeros([], tl.int64)
        needed = tl.full([], 2**62, tl.int64)
        mode = tl.full([], WHOLE, tl.int32)
        pending = tl.zeros([], tl.int32)
        smallest = smallest_weight(floor)
        if counts:
            if MAY_CUT_BY_COUNT:
                mode = tl.full([], COUNTED, tl.int32)
                candidates_ptr += row * capacity
                candidate_ids_ptr += row * capacity
                low = tl.full([], float("-inf"), tl.float32)
                if capacity < V:
                    low = count_bound(maxima, k)
                number = list_candidates(
                    maxima,
                    low,
                    logits_ptr,
                    candidates_ptr,
                    candidate_ids_ptr,
                    tile_list_ptr + row * PADDED_TILES,
                    ints_ptr + COUNT,
                    V,
                    capacity,
                    PADDED_TILES,
                    TILE,
                )
                bits, _more = random_words(seed, offset, STREAM, tl.zeros([], tl.int32))
                if number <= PAIRS:
                    drawn, cut, cut_id, kept = select_pairs(
                        number, k, p, smallest, bits, top, scale, candidates_ptr, candidate_ids_ptr
                    )
                else:
                    drawn, cut, cut_id, kept = select_searching(
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
        elif MAY_BE_WHOLE:
            sums = tl.load(sums_ptr + row * PADDED_TILES + tiles)
            tile_masses = masses_of_tiles(maxima, sums, top, scale)
            cumulative = tl.cumsum(tile_masses)
            total = tl.sum(tile_masses)
            if MAY_PEND:
                if p < 1:
                    mode = tl.full([], BY_MASS, tl.int32)
                    needed = at_least(p, total)
                pending = ((p < 1) | (floor > 0)).to(tl.int32)
                firsts, seconds = words_of_turns(0, seed, offset, TURNS)
                ids, x, _ties = draw_turns(firsts, seconds, cumulative, total, scale, logits_ptr, V, TILE)
                turns = tl.arange(0, TURNS)
                tl.store(out_ptr + row, tl.sum(tl.where(turns == 0, ids, 0)))
                good = weigh(x, top, scale) >= smallest
                # Nothing stands before an infinite logit.
                tl.store(drawn_ids_ptr + row * TURNS + turns, tl.where(good, ids, -1))
                tl.store(drawn_x_ptr + row * TURNS + turns, tl.where(good, x, float("inf")))
                tl.store(before_ptr + row * TURNS + turns, tl.zeros([TURNS], tl.int64))
            else:
                firsts, seconds = words_of_turns(0, seed, offset, 1)
                ids, _drawn_x, _ties = draw_turns(firsts, seconds, cumulative, total, scale, logits_ptr, V, TILE)
                tl.store(out_ptr + row, tl.sum(ids))
        tl.store(floats_ptr + TOP, top)
        tl.store(floats_ptr + SCALE, scale)
        tl.store(floats_ptr + CUT, cut)
        tl.store(ints_ptr + MODE, mode)
        tl.store(ints_ptr + CUT_ID, cut_id)
        tl.store(ints_ptr + PENDING, pending)
        slots = tl.arange(0, MASSES)
        tl.store(masses_ptr + slots, tl.where(slots == KEPT, kept, tl.where(slots == NEEDED, needed, 0)))
