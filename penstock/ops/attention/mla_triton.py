"""Split-KV decode on the latent cache: the tile of keys that the scores read is the tile of values that they weigh.

The query heads, times q_len, are the rows of one matrix. The schedule and the sum of pieces are those of attention_decode.
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
from penstock.ops.attention._softmax_triton import LN2, LOG2E, finish, page_kind, pages_of, rescale, rows_at
from penstock.ops.attention.decode_plan import LEAD, MAX_ROWS, SHARE, TILE, attention_decode_plan, row_blocks


@dataclass(frozen=True)
class MlaConfig:
    """Launch configuration: keys of a block (at most a tile), warps, and stages of the load pipeline."""

    block_n: int
    num_warps: int
    num_stages: int


def candidates(itemsize: int, width: int, rows: int, pages: str) -> Iterator[MlaConfig]:
    """Configurations whose queries and pipeline fit a multiprocessor's shared memory."""
    for block_n, num_warps, num_stages in ((64, 8, 2), (32, 8, 3), (32, 8, 4), (16, 8, 6), (32, 4, 4), (64, 4, 2), (64, 8, 3)):
        if (rows + (num_stages - 1) * block_n) * width * itemsize <= 200_000 and (rows <= 16 or num_warps == 8):
            yield MlaConfig(block_n, num_warps, num_stages)


@tuned(candidates)
def configure(itemsize: int, width: int, rows: int, pages: str) -> MlaConfig:
    """The default for a kind of call.

    Args:
        itemsize: bytes of a value.
        width: of the latent, rounded up to a power of two.
        rows: query rows of a program, BLOCK_M of the kernel.
        pages: "small" or "large", as in page_kind.
    """
    if itemsize == 4:
        # float32 products run on the CUDA cores, which hold a whole operand in registers.
        return MlaConfig(16, 8, 2)
    return MlaConfig(64, 8, 2 if rows > 16 else 3)


@triton.jit
def _walk(
    q_latent,
    q_rope,
    cache,
    table,
    page_stride,
    slot_stride: tl.constexpr,
    own,
    k_len,
    score_scale,
    first,
    last,
    ROWS_DIFFER: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DC: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DC: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(acc, m, l) over the blocks of keys first..last-1 of one request; `own` is the key that each row stands on."""
    steps = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_DC)[None, :]
    rope_columns = tl.arange(0, BLOCK_DR)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_DC], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    k_stop = tl.minimum(k_len, last * BLOCK_N)
    score_scales = tl.full([BLOCK_M], 1.0, tl.float32) * score_scale
    pages = pages_of(table, first, k_stop, PAGE_SIZE, BLOCK_N)
    for block in tl.range(first, last):
        keys = block * BLOCK_N + steps
        inside = keys < k_len
        rows = rows_at(cache, pages, block, page_stride, slot_stride, PAGE_SIZE, BLOCK_N)
        pages = pages_of(table, block + 1, k_stop, PAGE_SIZE, BLOCK_N)
        latent = tl.load(rows + columns, inside[:, None] & (columns < DC), other=0.0)
        rope = tl.load(rows + DC + rope_columns, inside[:, None] & (rope_columns < DR), other=0.0)
        s = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(rope), s, input_precision=PRECISION)
        visible = inside[None, :]
        if ROWS_DIFFER:
            visible = visible & (keys[None, :] <= own[:, None])
        s = tl.where(visible, s, float("-inf"))
        p, alpha, m = rescale(s, m, score_scales, True, 0.0)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, l


@triton.jit(do_not_specialize=["num_requests"])
def _mla_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    table_ptr,
    seqlens_ptr,
    unit_start_ptr,
    first_tile_ptr,
    first_request_ptr,
    out_token,
    out_head,
    latent_token,
    latent_head,
    rope_token,
    rope_head,
    page_stride,
    slot_stride: tl.constexpr,
    table_row,
    num_requests,
    score_scale,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DC: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DC: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    # Programs of the same keys stand next to each other: the second one finds them in the L2 cache.
    program = tl.program_id(1)
    ROWS: tl.constexpr = HEADS * Q_LEN
    PER_TILE: tl.constexpr = TILE // BLOCK_N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < ROWS
    heads = rows % HEADS
    columns = tl.arange(0, BLOCK_DC)[None, :]
    rope_columns = tl.arange(0, BLOCK_DR)[None, :]
    total = tl.load(unit_start_ptr + num_requests)
    working = tl.maximum(tl.minimum(tl.num_programs(1), tl.cdiv(total, SHARE)), 1)
    unit = (program.to(tl.int64) * total // working).to(tl.int32)
    end = tl.minimum(((program + 1).to(tl.int64) * total // working).to(tl.int32), total)
    request = tl.load(first_request_ptr + program)
    while unit < end:
        k_len = tl.load(seqlens_ptr + request)
        begin = tl.load(unit_start_ptr + request) + LEAD
        request_end = tl.load(unit_start_ptr + request + 1)
        start = tl.maximum(unit, begin)
        stop = tl.minimum(request_end, end)
        if stop > start:
            hidden = tl.load(first_tile_ptr + request)
            first = (hidden + start - begin) * PER_TILE
            last = tl.minimum((hidden + stop - begin) * PER_TILE, tl.cdiv(k_len, BLOCK_N))
            tokens = (request * Q_LEN + rows // HEADS).to(tl.int64)
            at = q_latent_ptr + (tokens * latent_token + heads * latent_head)[:, None] + columns
            q_latent = tl.load(at, exists[:, None] & (columns < DC), other=0.0)
            rope_at = q_rope_ptr + (tokens * rope_token + heads * rope_head)[:, None] + rope_columns
            q_rope = tl.load(rope_at, exists[:, None] & (rope_columns < DR), other=0.0)
            own = rows // HEADS + (k_len - Q_LEN)
            table = table_ptr + request.to(tl.int64) * table_row
            acc, m, l = _walk(q_latent, q_rope, cache_ptr, table, page_stride, slot_stride, own, k_len, score_scale, first,
                              last, Q_LEN > 1, PAGE_SIZE, BLOCK_M, BLOCK_N, DC, DR, BLOCK_DC, BLOCK_DR, PRECISION)  # fmt: skip
            acc, lse = finish(acc, m, l, m, False)
            if (start == begin) & (stop == request_end):
                at = out_ptr + (tokens * out_token + heads * out_head)[:, None] + columns
                tl.store(at, acc.to(out_ptr.dtype.element_ty), exists[:, None] & (columns < DC))
                if HAS_LSE:
                    tl.store(lse_ptr + tokens * HEADS + heads, lse * LN2, exists)
            else:
                slot = 2 * program + tl.where(start == begin, 1, 0)
                piece = slot.to(tl.int64) * ROWS + rows
                tl.store(part_ptr + piece[:, None] * DC + columns, acc, exists[:, None] & (columns < DC))
                tl.store(part_lse_ptr + piece, lse, exists)
        unit = stop
        request += 1


def launch(
    out: Tensor,
    out_lse: Tensor | None,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    scale: float | None,
    plan: tuple[Tensor, ...] | None,
) -> None:
    """Launches over blocks of rows and the plan's programs, then the sum of pieces over tokens and heads."""
    T, Hq, Dc = q_latent.shape
    Dr, page_size = q_rope.shape[2], cache.shape[1]
    if T == 0:
        return
    rows = Hq * q_len
    block_m = max(16, triton.next_power_of_2(min(rows, MAX_ROWS)))
    block_dc = max(16, triton.next_power_of_2(Dc))
    config = configure.on(out.device, out.element_size(), block_dc, block_m, page_kind(page_size))
    if plan is None:
        shape = {"num_heads_q": Hq, "num_heads_kv": 1, "head_dim": Dc + Dr, "page_size": page_size, "q_len": q_len}
        plan = attention_decode_plan(seqlens_k, **shape, impl="triton")
    unit_start, first_tile, first_request = plan[:3]
    programs = first_request.shape[0]
    part, part_lse = empty_pieces(programs, 1, rows, Dc, out.device)
    scale = (Dc + Dr) ** -0.5 if scale is None else scale
    _mla_kernel[(row_blocks(rows), programs)](
        out,
        out if out_lse is None else out_lse,
        part,
        part_lse,
        q_latent,
        q_rope,
        cache,
        page_table,
        seqlens_k,
        unit_start,
        first_tile,
        first_request,
        *out.stride()[:2],
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        *cache.stride()[:2],
        page_table.stride(0),
        seqlens_k.shape[0],
        scale * LOG2E,
        HEADS=Hq,
        Q_LEN=q_len,
        HAS_LSE=out_lse is not None,
        PAGE_SIZE=page_size,
        LEAD=LEAD,
        SHARE=SHARE,
        TILE=TILE,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        DC=Dc,
        DR=Dr,
        BLOCK_DC=block_dc,
        BLOCK_DR=max(16, triton.next_power_of_2(Dr)),
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        EARLY=has_dependent_launch(out.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    combine(out, out_lse, part, part_lse, None, unit_start, 1, q_len)
