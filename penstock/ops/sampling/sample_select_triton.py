"""Top-k of one row by one program, from the largest logits of its tiles: candidates, the exact cut, the draw."""

import triton
import triton.language as tl

from penstock.ops.sampling._search_triton import cut_by_mass, draw_kept, past, search, tie_cut
from penstock.ops.sampling._weights_triton import at_least, clean, key_of, logit_of, weigh

# So few candidates are compared each with each; more are searched, CHUNK at a time.
PAIRS = tl.constexpr(128)
CHUNK = tl.constexpr(1024)
# Tiles that are read at once.
GROUP = tl.constexpr(32)


@triton.jit
def count_bound(maxima, k):
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
def list_candidates(
    maxima,
    low,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    tile_list_ptr,
    counters_ptr,
    V,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the logits from `low` on and their ids in any order; returns how many there are, written or not."""
    tiles = tl.arange(0, PADDED_TILES)
    wanted = maxima >= low
    flags = wanted.to(tl.int32)
    tl.store(tile_list_ptr + tl.cumsum(flags) - flags, tiles, wanted)
    tl.store(counters_ptr, 0)
    tl.debug_barrier()
    number = tl.sum(flags)
    for start in range(0, number, GROUP):
        slots = start + tl.arange(0, GROUP)
        tile = tl.load(tile_list_ptr + slots, slots < number, other=0)
        columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        inside = (slots < number)[:, None] & (columns < V)
        x = clean(tl.load(logits_ptr + columns, inside, other=float("-inf")))
        chosen = inside & (x >= low)
        at = tl.atomic_add(counters_ptr + tl.zeros_like(columns), 1, chosen, sem="relaxed")
        written = chosen & (at < capacity)
        tl.store(candidates_ptr + at, x, written)
        tl.store(candidate_ids_ptr + at, columns, written)
    tl.debug_barrier()
    # The counter lives in the second-level cache: an atomic reads it there.
    return tl.atomic_add(counters_ptr, 0, sem="relaxed")


@triton.jit
def select_pairs(number, k, p, smallest, bits, top, scale, candidates_ptr, candidate_ids_ptr):
    """(id drawn, last logit kept, last id kept at it, mass) by comparing every two candidates."""
    slots = tl.arange(0, PAIRS)
    inside = slots < number
    x = tl.load(candidates_ptr + slots, inside, other=float("-inf"))
    ids = tl.load(candidate_ids_ptr + slots, inside, other=2147483647)
    weights = tl.where(inside, weigh(x, top, scale), 0)
    before = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (ids[None, :] < ids[:, None]))
    kept = inside & (tl.sum(before.to(tl.int32), axis=1) < k)
    counted = tl.where(kept, weights, 0)
    if p < 1:
        needed = at_least(p, tl.sum(counted))
        kept = kept & (tl.sum(tl.where(before, counted[None, :], 0), axis=1) < needed)
    cut = tl.min(tl.where(kept, x, float("inf")))
    cut_id = tl.max(tl.where(kept & (x == cut), ids, -1))
    drawable = tl.where(kept & (weights >= smallest), weights, 0)
    mass = tl.sum(drawable)
    target = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
    reached = tl.sum(tl.where(ids[None, :] <= ids[:, None], drawable[None, :], 0), axis=1)
    return tl.min(tl.where((drawable > 0) & (reached > target), ids, 2147483647)), cut, cut_id, mass


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
