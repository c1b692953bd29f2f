"""Splits of a row reduce to (largest, sum of exponentials, ids before the chosen one); a second kernel adds them up."""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms

BLOCK = 2048
MAX_SPLITS = 64


@triton.jit
def _partial_kernel(
    largest_ptr,
    total_ptr,
    before_ptr,
    logits_ptr,
    ids_ptr,
    V,
    logits_stride,
    blocks,
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
    largest = tl.max(maxima)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    at = row * SPLITS + split
    tl.store(largest_ptr + at, largest)
    tl.store(total_ptr + at, tl.sum(sums * tl.exp(maxima - shift)))
    tl.store(before_ptr + at, tl.sum(before))


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
    """Splits rows so that two programs a multiprocessor are busy; `best` holds the best ids, or None for top_n = 0."""
    B, V = logits.shape
    if B == 0:
        return
    all_blocks = triton.cdiv(V, BLOCK)
    wanted = min(MAX_SPLITS, max(1, all_blocks), max(1, 2 * num_sms(logits.device) // B))
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
        SPLITS=splits,
        BLOCK=BLOCK,
        num_warps=4,
    )
    top_n = top_ids.shape[1]
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
