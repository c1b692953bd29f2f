"""One launch for keys and values: the first programs take rows of k, the others those of v.

A program takes rows (token, head) in memory's order. Where v is transposed inside its pages and there are many tokens it takes
a run of tokens of one head, turns it, and writes whole sectors along the slots. A run begins at the token whose slot is the
next multiple of its length, so that inside a request all lie aligned in their pages, wherever requests begin among the tokens;
what does not lie so, at the ends of requests or out of order, goes row by row and byte by byte.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.core.formats_triton import encode, largest, scale_of


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` rows of `block` columns; or, where `run` is not 0, that many tokens of one head."""

    rows: int
    block: int
    run: int = 0

    def programs(self, T: int, H: int) -> int:
        """Programs for T tokens of H heads."""
        return triton.cdiv(T, self.run) * H if self.run else triton.cdiv(T * H, self.rows)


def configure(D: int) -> Launch:
    """2,048 values a program of four warps: two 16-byte loads a thread in bfloat16, one 16-byte store in FP8."""
    block = triton.next_power_of_2(D)
    return Launch(max(1, min(64, 2048 // block)), block)


def configure_values(T: int, H: int, cache: Tensor) -> Launch:
    """Runs of 32 tokens, in FP8 a sector of memory for each dimension, where that leaves no multiprocessor idle."""
    _, page_size, _, D = cache.shape
    plain = configure(D)
    turned = Launch(plain.rows, plain.block, min(page_size, 32))
    transposed = cache.stride(3) != 1 and D > 1 and page_size >= 16
    return turned if transposed and turned.programs(T, H) >= num_sms(cache.device) else plain


@triton.jit
def locate_rows(block, H: tl.constexpr, ROWS: tl.constexpr):
    """(tokens, heads) of a program's rows."""
    rows = block * ROWS + tl.arange(0, ROWS)
    return rows // H, rows % H


@triton.jit
def store_rows(
    x,
    cache_ptr,
    slot,
    heads,
    columns,
    cache_page,
    cache_slot,
    cache_head,
    cache_column,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Writes x [ROWS, BLOCK], already of the cache's dtype, into the slots that are not negative."""
    page = (slot // PAGE).to(tl.int64)[:, None]
    offset = (slot % PAGE).to(tl.int64)[:, None]
    target = cache_ptr + page * cache_page + offset * cache_slot + heads.to(tl.int64)[:, None] * cache_head
    target += columns.to(tl.int64)[None, :] * cache_column
    tl.store(target, x, (slot >= 0)[:, None] & (columns < D)[None, :])


@triton.jit
def quantise_rows(
    x,
    scale_ptr,
    slot,
    heads,
    scale_page,
    scale_slot,
    scale_head,
    SCALING: tl.constexpr,
    PAGE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows x in the cache's dtype: as they are, by a static scale, or by their own, which is stored in their slots."""
    if SCALING == "none":
        return x.to(dtype)
    else:
        x = x.to(tl.float32)
        live = slot >= 0
        if SCALING == "static":
            scale = tl.load(scale_ptr + heads * scale_head, live, other=1.0)
        else:
            scale = scale_of(largest(x, 1), 448.0)
            page = (slot // PAGE).to(tl.int64)
            offset = (slot % PAGE).to(tl.int64)
            tl.store(scale_ptr + page * scale_page + offset * scale_slot + heads * scale_head, scale, live)
        return encode(x, scale[:, None], dtype)


@triton.jit
def store_part(
    tokens,
    heads,
    slot,
    x_ptr,
    cache_ptr,
    scale_ptr,
    x_token,
    x_head,
    cache_page,
    cache_slot,
    cache_head,
    cache_column,
    scale_page,
    scale_slot,
    scale_head,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows from reading to storing; those whose slot is negative are left out."""
    columns = tl.arange(0, BLOCK)
    rows = x_ptr + tokens.to(tl.int64)[:, None] * x_token + heads.to(tl.int64)[:, None] * x_head
    x = tl.load(rows + columns[None, :], (slot >= 0)[:, None] & (columns < D)[None, :], other=0.0)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    x = quantise_rows(x, scale_ptr, slot, heads, scale_page, scale_slot, scale_head, SCALING, PAGE, dtype)
    store_rows(x, cache_ptr, slot, heads, columns, cache_page, cache_slot, cache_head, cache_column, D, PAGE)


@triton.jit
def _first_token(slots_ptr, run, num_tokens, RUN: tl.constexpr):
    """Where a run's tokens begin; runs follow each other without a gap whatever the slots are."""
    token = run * RUN
    slot = tl.load(slots_ptr + token, token < num_tokens, other=0)
    shift = tl.where(slot >= 0, -slot & (RUN - 1), 0)
    return tl.where(run == 0, 0, tl.minimum(token + shift, num_tokens))


@triton.jit
def store_values(
    block,
    x_ptr,
    cache_ptr,
    slots_ptr,
    scale_ptr,
    num_tokens,
    x_token,
    x_head,
    cache_page,
    cache_slot,
    cache_head,
    cache_column,
    scale_head,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """A program's part of v: rows, or where RUN is not 0 a run of tokens of one head."""
    if RUN == 0:
        tokens, heads = locate_rows(block, H, ROWS)
        slot = tl.load(slots_ptr + tokens, tokens < num_tokens, other=-1)
        store_part(
            tokens,
            heads,
            slot,
            x_ptr,
            cache_ptr,
            scale_ptr,
            x_token,
            x_head,
            cache_page,
            cache_slot,
            cache_head,
            cache_column,
            0,
            0,
            scale_head,
            D,
            PAGE,
            SCALING,
            BLOCK,
        )
    else:
        # Half as many rows as elsewhere: with all of them their addresses take 96 registers.
        LEFT: tl.constexpr = max(1, ROWS // 2)
        head = block % H
        begin = _first_token(slots_ptr, block // H, num_tokens, RUN)
        end = _first_token(slots_ptr, block // H + 1, num_tokens, RUN)
        lanes = tl.arange(0, RUN)
        slot = tl.load(slots_ptr + begin + lanes, begin + lanes < end, other=-1)
        first = tl.load(slots_ptr + begin, begin < end, other=-1)
        follow = tl.min((slot == first + lanes).to(tl.int32), axis=0) == 1
        whole = follow & (first >= 0) & (first % RUN == 0)
        if whole:
            columns = tl.arange(0, BLOCK)
            rows = x_ptr + begin.to(tl.int64) * x_token + head.to(tl.int64) * x_head
            x = tl.load(rows + lanes.to(tl.int64)[:, None] * x_token + columns[None, :], (columns < D)[None, :], other=0.0)
            x = tl.trans(x)
            dtype: tl.constexpr = cache_ptr.dtype.element_ty
            if SCALING == "none":
                x = x.to(dtype)
            else:
                x = encode(x.to(tl.float32), tl.load(scale_ptr + head * scale_head), dtype)
            page = (first // PAGE).to(tl.int64)
            offset = tl.multiple_of(first % PAGE, RUN).to(tl.int64)
            target = cache_ptr + page * cache_page + head.to(tl.int64) * cache_head + offset * cache_slot
            target += columns.to(tl.int64)[:, None] * cache_column
            tl.store(target + lanes[None, :] * cache_slot, x, (columns < D)[:, None])
            begin += RUN
        for start in range(begin, end, LEFT):
            tokens = start + tl.arange(0, LEFT)
            store_part(
                tokens,
                head + tl.zeros_like(tokens),
                tl.load(slots_ptr + tokens, tokens < end, other=-1),
                x_ptr,
                cache_ptr,
                scale_ptr,
                x_token,
                x_head,
                cache_page,
                cache_slot,
                cache_head,
                cache_column,
                0,
                0,
                scale_head,
                D,
                PAGE,
                SCALING,
                BLOCK,
            )


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_tokens,
    k_blocks,
    k_token,
    k_head,
    v_token,
    v_head,
    k_page,
    k_slot,
    k_cache_head,
    k_column,
    v_page,
    v_slot,
    v_cache_head,
    v_column,
    k_scale_page,
    k_scale_slot,
    k_scale_head,
    v_scale_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    K_SCALING: tl.constexpr,
    V_SCALING: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_ROWS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_RUN: tl.constexpr,
):
    block = tl.program_id(0)
    if block < k_blocks:
        tokens, heads = locate_rows(block, H, K_ROWS)
        store_part(
            tokens,
            heads,
            tl.load(slots_ptr + tokens, tokens < num_tokens, other=-1),
            k_ptr,
            k_cache_ptr,
            k_scale_ptr,
            k_token,
            k_head,
            k_page,
            k_slot,
            k_cache_head,
            k_column,
            k_scale_page,
            k_scale_slot,
            k_scale_head,
            D,
            PAGE,
            K_SCALING,
            K_BLOCK,
        )
    else:
        store_values(
            block - k_blocks,
            v_ptr,
            v_cache_ptr,
            slots_ptr,
            v_scale_ptr,
            num_tokens,
            v_token,
            v_head,
            v_page,
            v_slot,
            v_cache_head,
            v_column,
            v_scale_head,
            H,
            DV,
            PAGE,
            V_SCALING,
            V_ROWS,
            V_BLOCK,
            V_RUN,
        )


def scaling_of(scale: Tensor | None) -> tuple[str, tuple[int, int, int]]:
    """How a scale is meant, and its strides by page, slot and head."""
    if scale is None:
        return "none", (0, 0, 0)
    if scale.dim() == 1:
        return "static", (0, 0, scale.stride(0) if scale.shape[0] > 1 else 0)
    return "dynamic", (scale.stride(0), scale.stride(1), scale.stride(2))


def launch(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Launches over all (token, head) rows of both; scales are given together or not at all."""
    T, H, D = k.shape
    page_size, Dv = v_cache.shape[1], v.shape[2]
    if T * H == 0:
        return
    k_config, v_config = configure(D), configure_values(T, H, v_cache)
    k_scaling, k_scale_strides = scaling_of(k_scale)
    v_scaling, v_scale_strides = scaling_of(v_scale)
    k_blocks = k_config.programs(T, H)
    _store_kv_kernel[(k_blocks + v_config.programs(T, H),)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k_scale,
        v_scale,
        T,
        k_blocks,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        k_cache.stride(3) if D > 1 else 1,
        *v_cache.stride()[:3],
        v_cache.stride(3) if Dv > 1 else 1,
        *k_scale_strides,
        v_scale_strides[2],
        H=H,
        D=D,
        DV=Dv,
        PAGE=page_size,
        K_SCALING=k_scaling,
        V_SCALING=v_scaling,
        K_ROWS=k_config.rows,
        K_BLOCK=k_config.block,
        V_ROWS=v_config.rows,
        V_BLOCK=v_config.block,
        V_RUN=v_config.run,
    )
