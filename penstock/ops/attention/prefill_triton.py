"""FlashAttention-2 on packed queries; keys packed or in pages.

A program owns BLOCK_M queries of one head and walks the blocks of keys that any of them sees. Scores are masked
only in blocks that the diagonal, a window's edge or the end of the keys cuts. Tiles are ordered so that
the heads of one KV head are neighbours, a section's keys fit in the L2, and within a section the longest tiles come first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.tuning import tuned
from penstock.ops.attention._blocks_triton import list_blocks
from penstock.ops.attention._softmax_triton import (
    LN2,
    LOG2E,
    NO_SCALES,
    finish,
    fp8_scales,
    page_kind,
    pages_of,
    rescale,
    rows_at,
    tanh,
)

# Programs that clear the rows after the last request; they return at once where there are none.
CLEARING = 8
# Keys and values of one section of tiles; the H200's L2 holds 60 MB and also serves queries and results.
SECTION_BYTES = 32 << 20
UNSPECIALIZED = ["num_requests", "num_rows", "num_tiles", "num_blocks", "num_pairs", "section", "left", "right"]


@dataclass(frozen=True)
class PrefillConfig:
    """Launch configuration: queries and keys of a block, warps, and stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Up to this many queries the whole request is one block of rows.
SHORT = 64


def candidates(itemsize: int, width: int, pages: str, queries: str, causal: bool, window: bool) -> Iterator[PrefillConfig]:
    """Blocks of 64 queries, of which two programs share a multiprocessor, and of 128, which read the keys half as often."""
    if itemsize == 4:
        return
    shapes = [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        *[(128, 64, 8, stages) for stages in (2, 3, 4)],
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ]
    # Twice as wide, 64 queries on 4 warps spill 180 bytes beside the scores of as many keys.
    if width > 128:
        shapes = [(64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2)]
    elif width <= 64:
        shapes.append((64, 128, 4, 2))
    for block_m, block_n, num_warps, num_stages in shapes:
        shared = (block_m + 2 * num_stages * block_n) * width * itemsize
        if shared <= 230_000 and (block_m == 64 or queries != "short"):
            yield PrefillConfig(block_m, block_n, num_warps, num_stages)


@tuned(candidates)
def configure(itemsize: int, width: int, pages: str, queries: str, causal: bool, window: bool) -> PrefillConfig:
    """The default for a kind of call.

    Args:
        itemsize: bytes of a value.
        width: the wider of the two head dimensions, rounded up to a power of two.
        pages: "none", "small" or "large", as in page_kind.
        queries: "short", "medium" or "long", as in query_kind.
    """
    if itemsize == 4:
        # Products run on the CUDA cores, which hold whole operands in registers.
        if width > 32:
            return PrefillConfig(16 if width > 128 else 32, 32, 8, 1)
        return PrefillConfig(64, 32, 4, 2)
    if queries == "short":
        return PrefillConfig(64, 64, 8 if width > 128 else 4, 2)
    if width > 128:
        return PrefillConfig(128, 64, 8, 2)
    if width > 64:
        return PrefillConfig(128, 64, 8, 3)
    return PrefillConfig(128, 128, 8, 3)


def query_kind(max_seqlen_q: int) -> str:
    """What a table tells apart: one block of rows, the chunks of a server, whole prompts."""
    return "short" if max_seqlen_q <= SHORT else "medium" if max_seqlen_q <= 2048 else "long"


@triton.jit
def _blocks(
    acc,
    m,
    l,
    q,
    k_base,
    v_base,
    table,
    k_page,
    k_slot,
    v_page,
    v_slot,
    v_column,
    own,
    low,
    k_len,
    left,
    right,
    cap_scale,
    score_scale,
    k_scale_base,
    k_scale_page,
    k_scale_slot,
    listed,
    first,
    full_first,
    full_end,
    last,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LIST: tl.constexpr,
    FP8: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the blocks of keys first..last-1; `own` is the key that each query stands on.

    All queries see all keys of the blocks full_first..full_end-1. One loop runs through both kinds, so that the load pipeline
    is filled once. With HAS_LIST first and last count through the blocks of keys that `listed` names, 128 keys each.
    """
    PER: tl.constexpr = 128 // BLOCK_N
    steps = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)[None, :]
    v_columns = tl.arange(0, BLOCK_DV)[None, :]
    k_stop = k_len if HAS_LIST else tl.minimum(k_len, last * BLOCK_N)
    block = first
    if HAS_LIST:
        block = tl.load(listed + first // PER, first < last, other=0) * PER + first % PER
    pages = 0
    if PAGE_SIZE > 0:
        pages = pages_of(table, block, k_stop, PAGE_SIZE, BLOCK_N)
    for i in tl.range(first, last):
        if not HAS_LIST:
            block = i
        keys = block * BLOCK_N + steps
        inside = keys < k_len
        if HAS_LEFT:
            inside = inside & (keys >= low)
        k_at = rows_at(k_base, pages, block, k_page, k_slot, PAGE_SIZE, BLOCK_N) + columns
        v_at = rows_at(v_base, pages, block, v_page, v_slot, PAGE_SIZE, BLOCK_N) + v_columns * v_column
        if TOKEN_SCALES:
            k_scale_at = rows_at(k_scale_base, pages, block, k_scale_page, k_scale_slot, PAGE_SIZE, BLOCK_N)
            k_scales = tl.load(k_scale_at, inside[:, None], other=1.0)
        following = i + 1
        if HAS_LIST:
            following = tl.load(listed + (i + 1) // PER, i + 1 < last, other=0) * PER + (i + 1) % PER
        if PAGE_SIZE > 0:
            pages = pages_of(table, following, k_stop, PAGE_SIZE, BLOCK_N)
        k = tl.load(k_at, inside[:, None] & (columns < D), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TOKEN_SCALES:
            s = s * tl.trans(k_scales)
        if HAS_CAP:
            s = tanh(s * cap_scale[:, None])
        if (block < full_first) | (block >= full_end):
            visible = inside[None, :]
            if HAS_LEFT:
                visible = visible & (keys[None, :] >= (own - left)[:, None])
            if HAS_RIGHT:
                visible = visible & (keys[None, :] <= (own + right)[:, None])
            s = tl.where(visible, s, float("-inf"))
        p, alpha, m = rescale(s, m, score_scale, True, 8.0 if FP8 else 0.0)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = tl.load(v_at, inside[:, None] & (v_columns < DV), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if HAS_LIST:
            block = following
    return acc, m, l


@triton.jit
def _clear(out_ptr, lse_ptr, out_token, out_head, part, begin, num_rows, heads, HAS_LSE: tl.constexpr, ROWS: tl.constexpr,
           PARTS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Zero and -inf for the rows that belong to no request."""
    columns = tl.arange(0, BLOCK_DV)[None, :]
    for row in tl.range(begin + part * ROWS, num_rows, PARTS * ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < num_rows
        for head in tl.range(0, heads):
            at = out_ptr + (rows * out_token)[:, None] + head * out_head + columns
            zero = tl.zeros([ROWS, BLOCK_DV], out_ptr.dtype.element_ty)
            tl.store(at, zero, inside[:, None] & (columns < DV))
            if HAS_LSE:
                tl.store(lse_ptr + rows * heads + head, tl.full([ROWS], float("-inf"), tl.float32), inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prefill_kernel(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    listed_ptr,
    before_ptr,
    table_ptr,
    cu_seqlens_q_ptr,
    lengths_ptr,
    out_token,
    out_head,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    v_column,
    q_scale_token,
    q_scale_head,
    k_scale_page,
    k_scale_slot,
    k_scale_head,
    v_scale_head,
    table_row,
    mask_rows,
    mask_columns,
    num_requests,
    num_rows,
    num_tiles,
    num_blocks,
    num_pairs,
    section,
    left,
    right,
    cap_scale,
    score_scale,
    heads: tl.constexpr,
    group: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LIST: tl.constexpr,
    FP8: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= num_tiles:
        begin = tl.load(cu_seqlens_q_ptr + num_requests)
        _clear(
            out_ptr, lse_ptr, out_token, out_head, tile - num_tiles, begin, num_rows, heads, HAS_LSE, 16, PARTS, DV, BLOCK_DV
        )
        return
    section_index = tile // (section * num_blocks)
    within = tile - section_index * (section * num_blocks)
    width = tl.minimum(section, num_pairs - section_index * section)
    block_m = num_blocks - 1 - within // width
    pair = section_index * section + within % width
    request = pair // heads
    head = pair % heads

    q_begin = tl.load(cu_seqlens_q_ptr + request)
    q_len = tl.load(cu_seqlens_q_ptr + request + 1) - q_begin
    row_begin = block_m * BLOCK_M
    if row_begin >= q_len:
        return
    k_head_offset = (head // group).to(tl.int64)
    if PAGE_SIZE == 0:
        k_begin = tl.load(lengths_ptr + request)
        k_len = tl.load(lengths_ptr + request + 1) - k_begin
        k_base = k_ptr + k_begin.to(tl.int64) * k_slot + k_head_offset * k_head
        v_base = v_ptr + k_begin.to(tl.int64) * v_slot + k_head_offset * v_head
    else:
        k_len = tl.load(lengths_ptr + request)
        k_base = k_ptr + k_head_offset * k_head
        v_base = v_ptr + k_head_offset * v_head
    table = table_ptr + request.to(tl.int64) * table_row

    rows = row_begin + tl.arange(0, BLOCK_M)
    tokens = (q_begin + rows).to(tl.int64)
    own = rows + (k_len - q_len)
    own_first = row_begin + (k_len - q_len)
    own_last = tl.minimum(row_begin + BLOCK_M, q_len) - 1 + (k_len - q_len)
    # Keys low..high-1 are seen by some query of the block, keys from full_low to full_high-1 by every one.
    low = 0
    high = k_len
    full_low = 0
    full_high = k_len
    if HAS_LEFT:
        low = tl.maximum(own_first - left, 0)
        full_low = tl.maximum(own_last - left, 0)
    if HAS_RIGHT:
        high = tl.minimum(k_len, tl.maximum(own_last + right + 1, 0))
        full_high = tl.minimum(k_len, tl.maximum(own_first + right + 1, 0))
    first = low // BLOCK_N
    end = tl.maximum(tl.cdiv(high, BLOCK_N), first)
    full_first = tl.minimum(tl.cdiv(full_low, BLOCK_N), end)
    full_end = tl.minimum(tl.maximum(full_high // BLOCK_N, full_first), end)
    listed = listed_ptr
    if HAS_LIST:
        PER: tl.constexpr = 128 // BLOCK_N
        row = ((request * heads + head).to(tl.int64) * mask_rows) + row_begin // 128
        listed = listed_ptr + row * mask_columns
        before = before_ptr + row * (mask_columns + 1)
        last_block = tl.cdiv(end, PER)
        first = tl.load(before + tl.minimum(first // PER, last_block)) * PER
        end = tl.load(before + last_block) * PER

    columns = tl.arange(0, BLOCK_D)[None, :]
    q_at = q_ptr + (tokens * q_token)[:, None] + head.to(tl.int64) * q_head + columns
    q = tl.load(q_at, (rows < q_len)[:, None] & (columns < D), other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    score_scales = tl.full([BLOCK_M], 1.0, tl.float32) * score_scale
    cap_scales = tl.full([BLOCK_M], 1.0, tl.float32) * cap_scale
    k_scale_base = k_scale_ptr
    if FP8:
        q_scale_at = q_scale_ptr + tokens * q_scale_token + head * q_scale_head
        row_scales = tl.load(q_scale_at, rows < q_len, other=1.0)
        if TOKEN_SCALES:
            k_scale_base = k_scale_ptr + k_head_offset * k_scale_head
        else:
            row_scales *= tl.load(k_scale_ptr + k_head_offset * k_scale_head)
        if HAS_CAP:
            cap_scales *= row_scales
        else:
            score_scales *= row_scales
    acc, m, l = _blocks(acc, m, l, q, k_base, v_base, table, k_page, k_slot, v_page, v_slot, v_column, own, low, k_len, left,
                        right, cap_scales, score_scales, k_scale_base, k_scale_page, k_scale_slot, listed, first, full_first,
                        full_end, end, HAS_LEFT, HAS_RIGHT, HAS_CAP, HAS_LIST, FP8, TOKEN_SCALES, PAGE_SIZE, BLOCK_N, D, DV,
                        BLOCK_D, BLOCK_DV, PRECISION)  # fmt: skip
    if FP8:
        # The weights were lifted by 2^8.
        l = l * 0.00390625
        acc = acc * (tl.load(v_scale_ptr + k_head_offset * v_scale_head) * 0.00390625)
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
    acc, lse = finish(acc, m, l, sink, HAS_SINKS)
    v_columns = tl.arange(0, BLOCK_DV)[None, :]
    out_at = out_ptr + (tokens * out_token)[:, None] + head.to(tl.int64) * out_head + v_columns
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), (rows < q_len)[:, None] & (v_columns < DV))
    if HAS_LSE:
        tl.store(lse_ptr + tokens * heads + head, lse * LN2, rows < q_len)


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> None:
    """Launches over tiles of queries; `lengths` is cu_seqlens_k, or seqlens_k where there is a page table."""
    num_rows, Hq, D = q.shape
    Dv, Hkv = v.shape[-1], v.shape[-2]
    if num_rows == 0 or Hq == 0:
        return
    paged = page_table is not None
    right = 0 if causal else window_right
    config = configure.on(
        q.device,
        q.element_size(),
        triton.next_power_of_2(max(D, Dv)),
        page_kind(k.shape[1] if paged else 0),
        query_kind(max_seqlen_q),
        right >= 0,
        window_left >= 0,
    )
    num_requests = cu_seqlens_q.shape[0] - 1
    num_blocks = triton.cdiv(max_seqlen_q, config.block_m)
    num_pairs = num_requests * Hq
    num_tiles = num_blocks * num_pairs
    group = Hq // Hkv
    key_bytes = max(1, max_seqlen_k * (D + Dv) * q.element_size())
    section = group * max(1, SECTION_BYTES // key_bytes)
    scale = D**-0.5 if scale is None else scale
    fp8 = q.dtype is torch.float8_e4m3fn
    scales = fp8_scales(q, q_scale, k_scale, v_scale) if fp8 else NO_SCALES
    listed = before = lengths
    mask_rows = mask_columns = 0
    if block_mask is not None:
        mask_rows, mask_columns = block_mask.shape[2:]
        listed, before = list_blocks(block_mask)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    _prefill_kernel[(num_tiles + CLEARING,)](
        out,
        out if out_lse is None else out_lse,
        q,
        k,
        v,
        q if sinks is None else sinks,
        *(scale if scale is not None else lengths for scale in scales[0]),
        listed,
        before,
        page_table if page_table is not None else lengths,
        cu_seqlens_q,
        lengths,
        *out.stride()[:2],
        *q.stride()[:2],
        k.stride(0) if paged else 0,
        *k.stride()[-3:-1],
        v.stride(0) if paged else 0,
        *v.stride()[-3:],
        *scales[1],
        page_table.stride(0) if page_table is not None else 0,
        mask_rows,
        mask_columns,
        num_requests,
        num_rows,
        num_tiles,
        num_blocks,
        num_pairs,
        min(section, max(num_pairs, 1)),
        window_left,
        right,
        scale / softcap if softcap else 1.0,
        (softcap if softcap else scale) * LOG2E,
        heads=Hq,
        group=group,
        HAS_LSE=out_lse is not None,
        HAS_SINKS=sinks is not None,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=right >= 0,
        HAS_CAP=bool(softcap),
        HAS_LIST=block_mask is not None,
        FP8=fp8,
        TOKEN_SCALES=k_scale is not None and k_scale.dim() == 3,
        PAGE_SIZE=k.shape[1] if paged else 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        D=D,
        DV=Dv,
        BLOCK_D=max(32 if fp8 else 16, triton.next_power_of_2(D)),
        BLOCK_DV=max(16, triton.next_power_of_2(Dv)),
        PARTS=CLEARING,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **options,
    )
