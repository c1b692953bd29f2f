"""Splits of a row reduce to (largest, sum of exponentials, ids before the chosen one); a second kernel adds them up.

The best ids come from the largest logits of the row's tiles of 128 ids: whatever is among the first n is not below the n-th
largest of these, so that one program a row finds it in few tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.ops.sampling._search_triton import elements, past, search, tie_cut
from penstock.ops.sampling._weights import TILE
from penstock.ops.sampling._weights_triton import clean, key_of, logit_of
from penstock.ops.sampling.sample_top_k_triton import PAIRS, count_bound, list_candidates

BLOCK = 2048
MAX_SPLITS = 64
# So many best ids are found here; more by torch.topk.
MOST = 64
CAPACITY = 2048
CHUNK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["blocks"])
def _partial_kernel(
    largest_ptr,
    total_ptr,
    before_ptr,
    logits_ptr,
    ids_ptr,
    V,
    logits_stride,
    blocks,
    maxima_ptr,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    logits_ptr += row * logits_stride
    chosen = tl.load(ids_ptr + row)
    own = tl.load(logits_ptr + chosen, (chosen >= 0) & (chosen < V), other=float("-inf")).to(tl.float32)
    own = tl.where(own != own, float("-inf"), own)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([BLOCK], tl.int32)
    for block in range(split * blocks, (split + 1) * blocks):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(logits_ptr + columns, inside, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("-inf"), x)
        above = tl.maximum(maxima, x)
        shift = tl.where(above == float("-inf"), 0.0, above)
        sums = sums * tl.exp(maxima - shift) + tl.exp(x - shift)
        maxima = above
        before += (inside & ((x > own) | ((x == own) & (columns < chosen)))).to(tl.int32)
        if maxima_ptr is not None:
            tiles = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
            largest_of_tiles = tl.max(tl.reshape(clean(x), [BLOCK // TILE, TILE]), axis=1)
            tl.store(maxima_ptr + row * PADDED_TILES + tiles, largest_of_tiles, tiles < PADDED_TILES)
    largest = tl.max(maxima)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    at = row * SPLITS + split
    tl.store(largest_ptr + at, largest)
    tl.store(total_ptr + at, tl.sum(sums * tl.exp(maxima - shift)))
    tl.store(before_ptr + at, tl.sum(before))


@triton.jit
def _best_kernel(
    best_ptr,
    maxima_ptr,
    tile_list_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    logits_ptr,
    V,
    top_n,
    logits_stride,
    capacity,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first top_n ids of a row's order: candidates, each compared with each."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    candidates_ptr += row * capacity
    candidate_ids_ptr += row * capacity
    maxima = tl.load(maxima_ptr + row * PADDED_TILES + tl.arange(0, PADDED_TILES))
    low = count_bound(maxima, tl.max(maxima), top_n)
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
    if number > PAIRS:
        listed = number <= capacity
        length = tl.where(listed, number, V)
        high = tl.full([], float("inf"), tl.float32)
        last = key_of(tl.max(maxima)).to(tl.int64)
        first = key_of(low).to(tl.int64)
        reached = search(
            top_n, False, first, last, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, low, 1.0, CHUNK
        )
        cut = logit_of(reached.to(tl.int32))
        above, _, ties = past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, cut, 1.0, CHUNK)
        cut_id = tl.zeros([], tl.int32) + V
        if top_n - above < ties:
            cut_id = tie_cut(
                top_n - above, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK
            )
        number = tl.zeros([], tl.int32)
        # Above what is read where the row itself is searched; the list is written from its start, never past what was read.
        for start in range(0, length, CHUNK):
            x, ids, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            chosen = chosen & ((x > cut) | ((x == cut) & (ids <= cut_id)))
            flags = chosen.to(tl.int32)
            slots = number + tl.cumsum(flags) - flags
            tl.debug_barrier()
            tl.store(candidates_ptr + slots, x, chosen)
            tl.store(candidate_ids_ptr + slots, ids, chosen)
            number += tl.sum(flags)
        tl.debug_barrier()
    slots = tl.arange(0, PAIRS)
    inside = slots < number
    x = tl.load(candidates_ptr + slots, inside, other=float("-inf"))
    ids = tl.load(candidate_ids_ptr + slots, inside, other=2147483647)
    before = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (ids[None, :] < ids[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    tl.store(best_ptr + row * top_n + rank, ids, inside & (rank < top_n))


@triton.jit
def _finish_kernel(
    chosen_ptr,
    ranks_ptr,
    top_ids_ptr,
    top_ptr,
    largest_ptr,
    total_ptr,
    before_ptr,
    logits_ptr,
    ids_ptr,
    best_ptr,
    V,
    top_n,
    logits_stride,
    SPLITS: tl.constexpr,
    TOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    at = row * SPLITS + tl.arange(0, SPLITS)
    maxima = tl.load(largest_ptr + at)
    largest = tl.max(maxima)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.load(total_ptr + at) * tl.exp(maxima - shift))
    log_total = tl.where(total > 0, shift + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    chosen = tl.load(ids_ptr + row)
    inside = (chosen >= 0) & (chosen < V)
    own = tl.load(logits_ptr + chosen, inside, other=float("-inf")).to(tl.float32)
    own = tl.where(own != own, float("-inf"), own)
    tl.store(chosen_ptr + row, own - log_total)
    tl.store(ranks_ptr + row, tl.where(inside, tl.sum(tl.load(before_ptr + at)) + 1, 0))
    if TOP > 0:
        slots = tl.arange(0, TOP)
        filled = slots < top_n
        best = tl.load(best_ptr + row * top_n + slots, filled, other=0)
        x = tl.load(logits_ptr + best, filled, other=0.0).to(tl.float32)
        x = tl.where(x != x, float("-inf"), x)
        tl.store(top_ids_ptr + row * top_n + slots, best.to(tl.int32), filled)
        tl.store(top_ptr + row * top_n + slots, x - log_total, filled)


def launch(
    chosen: Tensor, ranks: Tensor, top_ids: Tensor, top: Tensor, logits: Tensor, ids: Tensor, best: Tensor | None
) -> None:
    """Splits rows so that the multiprocessors are busy; `best` holds the best ids where there are more than MOST."""
    B, V = logits.shape
    if B == 0:
        return
    top_n = top_ids.shape[1]
    finds = 0 < top_n <= MOST
    padded_tiles = triton.next_power_of_2(triton.cdiv(V, TILE))
    maxima = chosen.new_full((B, padded_tiles), float("-inf"), dtype=torch.float32) if finds else None
    all_blocks = triton.cdiv(V, BLOCK)
    wanted = min(MAX_SPLITS, max(1, all_blocks), max(1, 8 * num_sms(logits.device) // B))
    splits = triton.next_power_of_2(wanted)
    partial = chosen.new_empty(2, B, splits)
    before = ranks.new_empty(B, splits)
    _partial_kernel[(B, splits)](
        partial[0],
        partial[1],
        before,
        logits,
        ids,
        V,
        logits.stride(0),
        triton.cdiv(all_blocks, splits),
        maxima,
        PADDED_TILES=padded_tiles,
        TILE=TILE,
        SPLITS=splits,
        BLOCK=BLOCK,
        num_warps=4,
    )
    if finds:
        best = top_ids
        _best_kernel[(B,)](
            best,
            maxima,
            ranks.new_empty(B, padded_tiles),
            chosen.new_empty(B, CAPACITY, dtype=torch.float32),
            ranks.new_empty(B, CAPACITY),
            logits,
            V,
            top_n,
            logits.stride(0),
            CAPACITY,
            PADDED_TILES=padded_tiles,
            TILE=TILE,
            num_warps=8,
        )
    _finish_kernel[(B,)](
        chosen,
        ranks,
        top_ids,
        top,
        partial[0],
        partial[1],
        before,
        logits,
        ids,
        best,
        V,
        top_n,
        logits.stride(0),
        SPLITS=splits,
        TOP=triton.next_power_of_2(top_n) if top_n else 0,
        num_warps=1,
    )
