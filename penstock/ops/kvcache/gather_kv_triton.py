"""A program finds the requests of its tokens by bisection of cu_seqlens on the device, then copies their rows."""

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


def configure(total: int, columns: int, sms: int, transposed: bool) -> Launch:
    """2,048 values at a time, 16 a thread; a program keeps to one such tile while there are fewer programs than SMs.

    Tiles are 128 columns wide, or 32 tokens high where a page is transposed.
    """
    block = min(triton.next_power_of_2(columns), 64 if transposed else 128)
    tokens = 32 if transposed else min(64, 2048 // block)
    few = triton.cdiv(total, tokens) < 4 * sms
    return Launch(tokens, block, block if few else columns)


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
    TRANSPOSED: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # The last request that starts at or before the token: empty requests before it share its start.
    low = tl.zeros((TOKENS,), tl.int32)
    high = low + num_requests
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle) <= tokens
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    index = tokens - tl.load(cu_seqlens_ptr + low)
    end = tl.load(cu_seqlens_ptr + low + 1)
    length = tl.load(seqlens_ptr + low)
    held = (index >= 0) & (index < length) & (tokens < end) & (tokens < total)
    entry = page_table_ptr + low.to(tl.int64) * table_row + (index // PAGE).to(tl.int64) * table_column
    page = tl.load(entry, held, other=0).to(tl.int64)
    sources = cache_ptr + page * cache_page + (index % PAGE).to(tl.int64) * cache_slot
    targets = out_ptr + tokens.to(tl.int64)[:, None] * out_token
    first = tl.program_id(1) * span
    for start in range(first, min(first + span, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        head = (column // D).to(tl.int64)
        dimension = column % D
        within = head * cache_head + dimension.to(tl.int64) * cache_column
        if TRANSPOSED:
            # Neighbouring threads take neighbouring slots of a dimension.
            values = tl.trans(tl.load(sources[None, :] + within[:, None], held[None, :] & inside[:, None], other=0))
        else:
            values = tl.load(sources[:, None] + within[None, :], held[:, None] & inside[None, :], other=0)
        place = (head * out_head + dimension)[None, :]
        tl.store(targets + place, values, (tokens < total)[:, None] & inside[None, :])


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
    transposed = cache.stride(3) != 1 and D > 1
    config = configure(total, H * D, num_sms(out.device), transposed)
    _gather_kernel[(triton.cdiv(total, config.tokens), triton.cdiv(H * D, config.span))](
        out,
        cache,
        page_table,
        seqlens,
        cu_seqlens,
        len(seqlens),
        total,
        H * D,
        config.span,
        *page_table.stride(),
        *out.stride()[:2],
        *cache.stride()[:3],
        cache.stride(3) if D > 1 else 1,
        D=D,
        PAGE=cache.shape[1],
        STEPS=len(seqlens).bit_length(),
        TOKENS=config.tokens,
        BLOCK=config.block,
        TRANSPOSED=transposed,
        num_warps=config.num_warps,
    )
