"""A program finds the requests of its tokens by bisection of cu_seqlens on the device, then copies their rows.

Where the cache is transposed inside its pages and there are many tokens a program takes a run of tokens of one head, reads
whole sectors along the slots, and turns them. A run begins at the token whose place in its request is the next multiple of its
length, so that inside a request all lie aligned in their pages; what is left at the ends of requests goes row by row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms


@dataclass(frozen=True)
class Launch:
    """A program takes `tokens` tokens and `span` of a token's columns, `block` at a time, with num_warps warps."""

    tokens: int
    block: int
    span: int
    num_warps: int = 4


def configure(total: int, columns: int, sms: int) -> Launch:
    """2,048 values at a time, 16 a thread; a program keeps to one such tile while there are fewer programs than SMs."""
    block = min(triton.next_power_of_2(columns), 128)
    tokens = min(64, 2048 // block)
    few = triton.cdiv(total, tokens) < 4 * sms
    return Launch(tokens, block, block if few else columns)


def run_length(total: int, cache: Tensor) -> int:
    """Tokens of a run, 32 bytes of a dimension in FP8; 0 where the cache is not transposed or there are too few."""
    _, page_size, H, D = cache.shape
    run = min(page_size, 32)
    transposed = cache.stride(3) != 1 and D > 1 and page_size >= 16
    return run if transposed and triton.cdiv(total, run) * H >= num_sms(cache.device) else 0


@triton.jit
def _request_of(token, cu_seqlens_ptr, num_requests, STEPS: tl.constexpr):
    """The last request that starts at or before the token: empty requests before it share its start."""
    low = token * 0
    high = low + num_requests
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _locate(
    tokens,
    cache_ptr,
    page_table_ptr,
    seqlens_ptr,
    cu_seqlens_ptr,
    num_requests,
    total,
    table_row,
    table_column,
    cache_page,
    cache_slot,
    PAGE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(where the slots of tokens lie, whether a request fills them)."""
    request = _request_of(tokens, cu_seqlens_ptr, num_requests, STEPS)
    index = tokens - tl.load(cu_seqlens_ptr + request)
    end = tl.load(cu_seqlens_ptr + request + 1)
    length = tl.load(seqlens_ptr + request)
    held = (index >= 0) & (index < length) & (tokens < end) & (tokens < total)
    entry = page_table_ptr + request.to(tl.int64) * table_row + (index // PAGE).to(tl.int64) * table_column
    page = tl.load(entry, held, other=0).to(tl.int64)
    return cache_ptr + page * cache_page + (index % PAGE).to(tl.int64) * cache_slot, held


@triton.jit
def _copy(
    sources,
    targets,
    held,
    live,
    column,
    inside,
    out_head,
    cache_head,
    cache_column,
    D: tl.constexpr,
):
    """Some columns, counted through the heads, of some slots."""
    head = (column // D).to(tl.int64)
    dimension = column % D
    within = head * cache_head + dimension.to(tl.int64) * cache_column
    values = tl.load(sources[:, None] + within[None, :], held[:, None] & inside[None, :], other=0)
    tl.store(targets[:, None] + (head * out_head + dimension)[None, :], values, live[:, None] & inside[None, :])


@triton.jit
def _gather_kernel(
    out_ptr,
    cache_ptr,
    page_table_ptr,
    seqlens_ptr,
    cu_seqlens_ptr,
    num_requests,
    total,
    columns,
    span,
    table_row,
    table_column,
    out_token,
    out_head,
    cache_page,
    cache_slot,
    cache_head,
    cache_column,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    sources, held = _locate(
        tokens,
        cache_ptr,
        page_table_ptr,
        seqlens_ptr,
        cu_seqlens_ptr,
        num_requests,
        total,
        table_row,
        table_column,
        cache_page,
        cache_slot,
        PAGE,
        STEPS,
    )
    targets = out_ptr + tokens.to(tl.int64) * out_token
    first = tl.program_id(1) * span
    for start in range(first, min(first + span, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        _copy(sources, targets, held, tokens < total, column, column < columns, out_head, cache_head, cache_column, D)


@triton.jit
def _first_token(run, cu_seqlens_ptr, num_requests, total, STEPS: tl.constexpr, RUN: tl.constexpr):
    """(where a run's tokens begin, the request there unless it ends before); runs follow each other without a gap."""
    token = run * RUN
    request = _request_of(token, cu_seqlens_ptr, num_requests, STEPS)
    index = token - tl.load(cu_seqlens_ptr + request)
    return tl.where(run == 0, 0, tl.minimum(token + (-index & (RUN - 1)), total)), request


@triton.jit
def _gather_turned_kernel(
    out_ptr,
    cache_ptr,
    page_table_ptr,
    seqlens_ptr,
    cu_seqlens_ptr,
    num_requests,
    total,
    table_row,
    table_column,
    out_token,
    out_head,
    cache_page,
    cache_slot,
    cache_head,
    cache_column,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    STEPS: tl.constexpr,
    RUN: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0) % H
    run = tl.program_id(0) // H
    begin, request = _first_token(run, cu_seqlens_ptr, num_requests, total, STEPS, RUN)
    end, _ = _first_token(run + 1, cu_seqlens_ptr, num_requests, total, STEPS, RUN)
    dimension = tl.arange(0, BLOCK)
    index = begin - tl.load(cu_seqlens_ptr + request)
    stop = tl.minimum(tl.load(cu_seqlens_ptr + request + 1), end)
    fits = (index + RUN <= tl.load(seqlens_ptr + request)) & (begin + RUN <= stop)
    if fits & (index >= 0) & (index % RUN == 0):
        entry = page_table_ptr + request.to(tl.int64) * table_row + (index // PAGE).to(tl.int64) * table_column
        lanes = tl.arange(0, RUN)
        offset = tl.multiple_of(index % PAGE, RUN).to(tl.int64)
        source = cache_ptr + tl.load(entry).to(tl.int64) * cache_page + head.to(tl.int64) * cache_head + offset * cache_slot
        source += dimension.to(tl.int64)[:, None] * cache_column
        values = tl.load(source + lanes[None, :] * cache_slot, (dimension < D)[:, None], other=0)
        target = out_ptr + begin.to(tl.int64) * out_token + head.to(tl.int64) * out_head
        target += lanes.to(tl.int64)[:, None] * out_token
        tl.store(target + dimension[None, :], tl.trans(values), (dimension < D)[None, :])
        begin += RUN
    for start in range(begin, end, LEFT):
        tokens = start + tl.arange(0, LEFT)
        sources, held = _locate(
            tokens,
            cache_ptr,
            page_table_ptr,
            seqlens_ptr,
            cu_seqlens_ptr,
            num_requests,
            end,
            table_row,
            table_column,
            cache_page,
            cache_slot,
            PAGE,
            STEPS,
        )
        targets = out_ptr + tokens.to(tl.int64) * out_token
        column = head * D + dimension
        _copy(sources, targets, held, tokens < end, column, dimension < D, out_head, cache_head, cache_column, D)


def launch(out: Tensor, cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor) -> None:
    """Launches over all rows of out, those that no request fills included."""
    total, H, D = out.shape
    if out.numel() == 0:
        return
    if len(seqlens) == 0 or page_table.shape[1] == 0 or cache.numel() == 0:
        out.zero_()
        return
    if cache.element_size() == 1:
        out, cache = out.view(torch.uint8), cache.view(torch.uint8)
    tensors = (out, cache, page_table, seqlens, cu_seqlens)
    strides = (*page_table.stride(), *out.stride()[:2], *cache.stride()[:3], cache.stride(3) if D > 1 else 1)
    constants = {"D": D, "PAGE": cache.shape[1], "STEPS": len(seqlens).bit_length()}
    run = run_length(total, cache)
    if run:
        block = triton.next_power_of_2(D)
        _gather_turned_kernel[(triton.cdiv(total, run) * H,)](
            *tensors, len(seqlens), total, *strides, **constants, H=H, RUN=run, LEFT=max(1, 1024 // block), BLOCK=block
        )
        return
    config = configure(total, H * D, num_sms(out.device))
    _gather_kernel[(triton.cdiv(total, config.tokens), triton.cdiv(H * D, config.span))](
        *tensors,
        len(seqlens),
        total,
        H * D,
        config.span,
        *strides,
        **constants,
        TOKENS=config.tokens,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
