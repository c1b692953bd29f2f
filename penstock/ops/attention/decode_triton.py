"""Split-KV decode: equal runs of work to a fixed number of programs, then one fixed-order sum of their pieces.

All query heads of one KV head, times q_len, are the rows of one matrix: the keys are read once for all of them. A program walks
its run of units request by request. A request that lies in one run is finished there; of the others each run leaves a piece, a
normalised result with its log-sum-exp, in one of the program's two scratch slots: a run can only begin in the middle of one
request (slot 2c) and end in the middle of one (slot 2c+1). The second kernel adds a request's pieces in the order of its keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from penstock.core.device import has_dependent_launch
from penstock.core.tuning import tuned
from penstock.ops.attention._combine_triton import combine, empty_pieces
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
from penstock.ops.attention.decode_plan import LEAD, MAX_ROWS, SHARE, TILE, attention_decode_plan, row_blocks

# Up to this many keys a request is one program's work: a schedule and a second kernel would cost more than they spread.
DIRECT_KEYS = 256


@dataclass(frozen=True)
class DecodeConfig:
    """Launch configuration: keys of a block (at most a tile), warps, and stages of the load pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


def candidates(itemsize: int, width: int, rows: int, pages: str) -> Iterator[DecodeConfig]:
    """Configurations that leave room for two programs on a multiprocessor."""
    # At D = 128 eight warps need 176 registers a thread: one program alone would fill the multiprocessor.
    shapes = [(64, 4, 4), (64, 4, 3), (64, 2, 4), (32, 4, 6), (32, 4, 4), (32, 2, 6)]
    if width * itemsize > 256:
        shapes = [(32, 4, 4), (32, 4, 3), (32, 8, 4), (32, 8, 3), (64, 8, 2), (16, 4, 6)]
    for block_n, num_warps, num_stages in shapes:
        if itemsize < 4 and (num_stages - 1) * block_n * 2 * width * itemsize <= 100_000:
            yield DecodeConfig(block_n, num_warps, num_stages)


@tuned(candidates)
def configure(itemsize: int, width: int, rows: int, pages: str) -> DecodeConfig:
    """The default for a kind of call.

    Args:
        itemsize: bytes of a value.
        width: the wider of the two head dimensions, rounded up to a power of two.
        rows: query rows of a program, BLOCK_M of the kernel.
        pages: "small" or "large", as in page_kind.
    """
    # float32 products run on the CUDA cores, which hold a whole operand in registers.
    widest = 32 if itemsize == 4 or rows > 32 else TILE
    if rows > 32 and width * itemsize == 512 and itemsize < 4:
        return DecodeConfig(32, 8, 3)
    return DecodeConfig(min(widest, max(16, TILE * 256 // (width * itemsize))), 4, 4)


@triton.jit
def _walk(
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
    k_len,
    low,
    left,
    right,
    cap_scale,
    score_scale,
    k_scale_base,
    k_scale_page,
    k_scale_slot,
    first,
    last,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    ROWS_DIFFER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FP8: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(acc, m, l) over the blocks of keys first..last-1 of one request; `own` is the key that each row stands on."""
    steps = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)[None, :]
    v_columns = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # The sum over keys waits until the end: one reduction across warps less in each step.
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k_stop = tl.minimum(k_len, last * BLOCK_N)
    pages = pages_of(table, first, k_stop, PAGE_SIZE, BLOCK_N)
    for block in tl.range(first, last):
        keys = block * BLOCK_N + steps
        inside = keys < k_len
        if HAS_LEFT:
            inside = inside & (keys >= low)
        k_at = rows_at(k_base, pages, block, k_page, k_slot, PAGE_SIZE, BLOCK_N) + columns
        v_at = rows_at(v_base, pages, block, v_page, v_slot, PAGE_SIZE, BLOCK_N) + v_columns * v_column
        if TOKEN_SCALES:
            k_scale_at = rows_at(k_scale_base, pages, block, k_scale_page, k_scale_slot, PAGE_SIZE, BLOCK_N)
            k_scales = tl.load(k_scale_at, inside[:, None], other=1.0)
        pages = pages_of(table, block + 1, k_stop, PAGE_SIZE, BLOCK_N)
        k = tl.load(k_at, inside[:, None] & (columns < D), other=0.0)
        v = tl.load(v_at, inside[:, None] & (v_columns < DV), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TOKEN_SCALES:
            s = s * tl.trans(k_scales)
        if HAS_CAP:
            s = tanh(s * cap_scale[:, None])
        visible = inside[None, :]
        if ROWS_DIFFER:
            if HAS_LEFT:
                visible = visible & (keys[None, :] >= (own - left)[:, None])
            if HAS_RIGHT:
                visible = visible & (keys[None, :] <= (own + right)[:, None])
        s = tl.where(visible, s, float("-inf"))
        p, alpha, m = rescale(s, m, score_scale, True, 8.0 if FP8 else 0.0)
        weights = weights * alpha[:, None] + p
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_requests", "left", "right"])
def _decode_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seqlens_ptr,
    sinks_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    unit_start_ptr,
    first_tile_ptr,
    first_request_ptr,
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
    num_requests,
    left,
    right,
    cap_scale,
    score_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    DIRECT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FP8: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        # The second kernel may be brought to the device as soon as every program of this one runs.
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    ROWS: tl.constexpr = GROUP * Q_LEN
    PER_TILE: tl.constexpr = TILE // BLOCK_N
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < ROWS
    heads = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, BLOCK_D)[None, :]
    v_columns = tl.arange(0, BLOCK_DV)[None, :]
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_head
    sink = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, exists, other=0.0).to(tl.float32) * 1.4426950408889634

    k_scale_base = k_scale_ptr
    kv_scale = 1.0
    v_lift = 1.0
    if FP8:
        if TOKEN_SCALES:
            k_scale_base = k_scale_ptr + kv_head.to(tl.int64) * k_scale_head
        else:
            kv_scale = tl.load(k_scale_ptr + kv_head * k_scale_head)
        # The weights are lifted by 2^8.
        v_lift = tl.load(v_scale_ptr + kv_head * v_scale_head) * 0.00390625

    if DIRECT:
        request = program
        unit = 0
        end = 1
    else:
        total = tl.load(unit_start_ptr + num_requests)
        working = tl.maximum(tl.minimum(tl.num_programs(1), tl.cdiv(total, SHARE)), 1)
        unit = (program.to(tl.int64) * total // working).to(tl.int32)
        end = tl.minimum(((program + 1).to(tl.int64) * total // working).to(tl.int32), total)
        request = tl.load(first_request_ptr + program)
    while unit < end:
        k_len = tl.load(seqlens_ptr + request)
        low = 0
        if HAS_LEFT:
            low = tl.maximum(k_len - Q_LEN - left, 0)
        if DIRECT:
            first = low // BLOCK_N
            last = tl.cdiv(k_len, BLOCK_N)
            begin = 0
            start = 0
            stop = 1
            request_end = 1
        else:
            # The first of the units that are tiles.
            begin = tl.load(unit_start_ptr + request) + LEAD
            request_end = tl.load(unit_start_ptr + request + 1)
            start = tl.maximum(unit, begin)
            stop = tl.minimum(request_end, end)
            hidden = tl.load(first_tile_ptr + request)
            first = (hidden + start - begin) * PER_TILE
            last = tl.minimum((hidden + stop - begin) * PER_TILE, tl.cdiv(k_len, BLOCK_N))
            if HAS_LEFT:
                first = tl.maximum(first, low // BLOCK_N)
        if stop > start or DIRECT:
            tokens = (request * Q_LEN + rows // GROUP).to(tl.int64)
            q_at = q_ptr + (tokens * q_token + heads * q_head)[:, None] + columns
            q = tl.load(q_at, exists[:, None] & (columns < D), other=0.0)
            own = rows // GROUP + (k_len - Q_LEN)
            table = table_ptr + request.to(tl.int64) * table_row
            score_scales = tl.full([BLOCK_M], 1.0, tl.float32) * score_scale
            cap_scales = tl.full([BLOCK_M], 1.0, tl.float32) * cap_scale
            if FP8:
                q_scale_at = q_scale_ptr + tokens * q_scale_token + heads * q_scale_head
                row_scales = tl.load(q_scale_at, exists, other=1.0) * kv_scale
                if HAS_CAP:
                    cap_scales *= row_scales
                else:
                    score_scales *= row_scales
            acc, m, l = _walk(q, k_base, v_base, table, k_page, k_slot, v_page, v_slot, v_column, own, k_len, low, left, right,
                              cap_scales, score_scales, k_scale_base, k_scale_page, k_scale_slot, first, last, HAS_LEFT,
                              HAS_RIGHT, Q_LEN > 1, HAS_CAP, FP8, TOKEN_SCALES, PAGE_SIZE, BLOCK_M, BLOCK_N, D, DV, BLOCK_D,
                              BLOCK_DV, PRECISION)  # fmt: skip
            if FP8:
                l = l * 0.00390625
                acc = acc * v_lift
            if (start == begin) & (stop == request_end):
                acc, lse = finish(acc, m, l, sink, HAS_SINKS)
                at = out_ptr + (tokens * out_token + heads * out_head)[:, None] + v_columns
                tl.store(at, acc.to(out_ptr.dtype.element_ty), exists[:, None] & (v_columns < DV))
                if HAS_LSE:
                    tl.store(lse_ptr + tokens * (KV_HEADS * GROUP) + heads, lse * LN2, exists)
            else:
                acc, lse = finish(acc, m, l, sink, False)
                slot = 2 * program + tl.where(start == begin, 1, 0)
                piece = (slot * KV_HEADS + kv_head).to(tl.int64) * ROWS + rows
                tl.store(part_ptr + piece[:, None] * DV + v_columns, acc, exists[:, None] & (v_columns < DV))
                tl.store(part_lse_ptr + piece, lse, exists)
        unit = stop
        request += 1


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    plan: tuple[Tensor, ...] | None,
) -> None:
    """Launches over KV heads, the plan's programs and blocks of rows, then the sum of pieces over tokens and heads."""
    T, Hq, D = q.shape
    _, page_size, Hkv, Dv = v_cache.shape
    B = seqlens_k.shape[0]
    if T == 0:
        return
    group = Hq // Hkv
    rows = group * q_len
    block_m = max(16, triton.next_power_of_2(min(rows, MAX_ROWS)))
    width = triton.next_power_of_2(max(D, Dv))
    config = configure.on(q.device, q.element_size(), width, block_m, page_kind(page_size))
    scale = D**-0.5 if scale is None else scale
    right = 0 if causal else window_right
    direct = plan is None and page_table.shape[1] * page_size <= DIRECT_KEYS
    if direct:
        unit_start = first_tile = first_request = seqlens_k
        programs = B
        part = part_lse = out
    else:
        if plan is None:
            shape = {"num_heads_q": Hq, "num_heads_kv": Hkv, "head_dim": D, "page_size": page_size, "q_len": q_len}
            plan = attention_decode_plan(seqlens_k, **shape, window=(window_left, -1), impl="triton")
        unit_start, first_tile, first_request = plan[:3]
        programs = first_request.shape[0]
        part, part_lse = empty_pieces(programs, Hkv, rows, Dv, q.device)
    fp8 = q.dtype is torch.float8_e4m3fn
    scales = fp8_scales(q, q_scale, k_scale, v_scale) if fp8 else NO_SCALES
    sink_values = q if sinks is None else sinks
    flags = {"HAS_LSE": out_lse is not None, "HAS_SINKS": sinks is not None}
    shape = {"KV_HEADS": Hkv, "GROUP": group, "Q_LEN": q_len, "DV": Dv, "BLOCK_DV": max(16, triton.next_power_of_2(Dv))}
    lse = out if out_lse is None else out_lse
    early = has_dependent_launch(q.device)
    _decode_kernel[(Hkv, programs, row_blocks(rows))](
        out,
        lse,
        part,
        part_lse,
        q,
        k_cache,
        v_cache,
        page_table,
        seqlens_k,
        sink_values,
        *(scale if scale is not None else q for scale in scales[0]),
        unit_start,
        first_tile,
        first_request,
        *out.stride()[:2],
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride(),
        *scales[1],
        page_table.stride(0),
        B,
        window_left,
        right,
        scale / softcap if softcap else 1.0,
        (softcap if softcap else scale) * LOG2E,
        DIRECT=direct,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=right >= 0,
        HAS_CAP=bool(softcap),
        FP8=fp8,
        TOKEN_SCALES=k_scale is not None and k_scale.dim() == 3,
        PAGE_SIZE=page_size,
        LEAD=LEAD,
        SHARE=SHARE,
        TILE=TILE,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        D=D,
        BLOCK_D=max(32 if fp8 else 16, triton.next_power_of_2(D)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        EARLY=early and not direct,
        **shape,
        **flags,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if direct:
        return
    combine(out, out_lse, part, part_lse, sinks, unit_start, Hkv, q_len)
