"""Top-k of one row by one program, from the largest logits of its tiles: the candidates, the exact cut and the draw.

Sums over pairs run down the first dimension of a matrix, which lies in registers and warps: no exchanges between lanes. Pairs
are taken in a loop: unrolled they filled 255 registers and 150 kB of instructions, which cost more than the arithmetic.
"""

import triton
import triton.language as tl

from penstock.ops.sampling._search_triton import cut_by_mass, draw_kept, past, search, tie_cut
from penstock.ops.sampling._weights_triton import at_least, clean, key_of, logit_of, weigh

# Bounds tried in a step, evenly between what is enough and what is not.
PIVOTS = tl.constexpr(8)
# Tiles that are read at once.
GROUP = tl.constexpr(32)
# So many candidates are compared each with each, ROWS with all at a time; more are searched.
PAIRS = tl.constexpr(128)
ROWS = tl.constexpr(16)
CHUNK = tl.constexpr(1024)
LARGEST_ORDER = tl.constexpr(2**63 - 1)


@triton.jit
def count_bound(maxima, top, k):
    """A logit that at least k tiles reach, hence at least k ids: near the k-th largest of the tiles' maxima; -inf without k."""
    keys = key_of(maxima)
    finite = maxima > float("-inf")
    low = key_of(tl.min(tl.where(finite, maxima, top))).to(tl.int64)
    high = key_of(top).to(tl.int64) + 1
    reach = tl.sum(finite.to(tl.int32))
    enough = reach >= k
    steps = tl.arange(0, PIVOTS)
    # What few more than k ids reach is as good as the best bound.
    while enough & (high - low > 1) & (reach > k + k // 8):
        pivots = low + ((high - low) * (steps + 1)) // (PIVOTS + 1)
        above = tl.sum((keys[None, :] >= pivots.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        reaches = above >= k
        high = tl.min(tl.where(reaches, high, pivots))
        low = tl.max(tl.where(reaches, pivots, low))
        reach = tl.min(tl.where(reaches, above, reach))
    return tl.where(enough, logit_of(low.to(tl.int32)), float("-inf"))


@triton.jit
def list_candidates(
    maxima,
    low,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    tile_list_ptr,
    V,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the logits from `low` on and their ids by ascending id; returns how many there are, written or not."""
    tiles = tl.arange(0, PADDED_TILES)
    wanted = maxima >= low
    flags = wanted.to(tl.int32)
    tl.store(tile_list_ptr + tl.cumsum(flags) - flags, tiles, wanted)
    tl.debug_barrier()
    number = tl.sum(flags)
    found = tl.zeros([], tl.int32)
    for start in range(0, number, GROUP):
        slots = start + tl.arange(0, GROUP)
        tile = tl.load(tile_list_ptr + slots, slots < number, other=0)
        # A vector a lane would have to be spread over lanes again before the scattered stores.
        columns = tl.max_contiguous(tile[:, None] * TILE + tl.arange(0, TILE)[None, :], [1, 1])
        inside = (slots < number)[:, None] & (columns < V)
        x = clean(tl.load(logits_ptr + columns, inside, other=float("-inf")))
        chosen = (inside & (x >= low)).to(tl.int32)
        own = tl.sum(chosen, axis=1)
        at = (found + tl.cumsum(own) - own)[:, None] + tl.cumsum(chosen, axis=1) - chosen
        written = (chosen != 0) & (at < capacity)
        tl.store(candidates_ptr + at, x, written)
        tl.store(candidate_ids_ptr + at, columns, written)
        found += tl.sum(own)
    tl.debug_barrier()
    return found


@triton.jit
def _some(start, number, candidates_ptr):
    """(logits, order) of the candidates from `start` on, up to ROWS; past the list they stand after all others."""
    slots = start + tl.arange(0, ROWS)
    x = tl.load(candidates_ptr + slots, slots < number, other=float("-inf"))
    return x, _order(x, slots)


@triton.jit
def _order(x, slots):
    """One integer orders candidates that are listed by ascending id: by logit, then the earlier in the list."""
    return (key_of(x).to(tl.int64) << 32) - slots


@triton.jit
def select_pairs(number, k, p, smallest, bits, top, scale, candidates_ptr, candidate_ids_ptr):
    """(id drawn, last logit kept, last id kept at it, mass) by comparing all candidates with ROWS at a time."""
    slots = tl.arange(0, PAIRS)
    inside = slots < number
    x = tl.load(candidates_ptr + slots, inside, other=float("-inf"))
    weights = tl.where(inside, weigh(x, top, scale), 0)
    order = _order(x, slots)
    ranks = tl.zeros([ROWS, PAIRS], tl.int32)
    for start in range(0, number, ROWS):
        _, others = _some(start, number, candidates_ptr)
        ranks += (others[:, None] > order[None, :]).to(tl.int32)
    kept = inside & (tl.sum(ranks, axis=0) < k)
    if p < 1:
        last = tl.min(tl.where(kept, order, LARGEST_ORDER))
        needed = at_least(p, tl.sum(tl.where(kept, weights, 0)))
        masses = tl.zeros([ROWS, PAIRS], tl.int64)
        for start in range(0, number, ROWS):
            other_x, others = _some(start, number, candidates_ptr)
            counted = tl.where(others >= last, weigh(other_x, top, scale), 0)
            masses += tl.where(others[:, None] > order[None, :], counted[:, None], 0)
        kept = kept & (tl.sum(masses, axis=0) < needed)
    cut = tl.min(tl.where(kept, x, float("inf")))
    last_slot = tl.max(tl.where(kept & (x == cut), slots, 0))
    drawable = tl.where(kept & (weights >= smallest), weights, 0)
    mass = tl.sum(drawable)
    target = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
    first = tl.min(tl.where(tl.cumsum(drawable) > target, slots, PAIRS - 1))
    return tl.load(candidate_ids_ptr + first), cut, tl.load(candidate_ids_ptr + last_slot), mass


@triton.jit
def select_searching(number, k, p, smallest, bits, low, top, scale, V, capacity, logits_ptr, candidates_ptr, candidate_ids_ptr):
    """The same by halving intervals, over the list of candidates or, where it does not hold them, over the row."""
    listed = number <= capacity
    length = tl.where(listed, number, V)
    high = tl.full([], float("inf"), tl.float32)
    last = key_of(top).to(tl.int64)
    reached = search(
        k,
        False,
        key_of(low).to(tl.int64),
        last,
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
    above, mass, ties = past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK)
    kept = (k - above).to(tl.int64)
    cut_id = tl.zeros([], tl.int32) + V
    if p < 1:
        needed = at_least(p, mass + kept * weigh(cut, top, scale))
        cut, cut_id = cut_by_mass(
            needed, reached, V, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK
        )
    elif kept < ties:
        cut_id = tie_cut(kept, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
    drawn, mass = draw_kept(
        bits,
        smallest,
        cut,
        cut_id,
        V,
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
    return drawn, cut, cut_id, mass
