"""One launch for keys and values: the first programs take rows of k, the others those of v.

A program takes rows (token, head) in memory's order. Where the cache is transposed inside its pages it takes tokens of a head,
turns the tile, and writes along the slots: as vectors where they are an aligned run of one page, which a prefill's are.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats_triton import encode, largest, scale_of


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` rows of `block` columns; `transposed` says that they are tokens of one head."""

    rows: int
    block: int
    transposed: bool

    def programs(self, T: int, H: int) -> int:
        """Programs for T tokens of H heads."""
        return triton.cdiv(T, self.rows) * H if self.transposed else triton.cdiv(T * H, self.rows)


def configure(D: int, page_size: int, transposed: bool) -> Launch:
    """2,048 values a program of four warps: two 16-byte loads a thread in bfloat16, one 16-byte store in FP8.

    Transposed: 16 tokens, one 16-byte store for a dimension, and eight warps, because with four a program takes 148 registers.
    """
    block = triton.next_power_of_2(D)
    if transposed:
        return Launch(min(page_size, 16), block, True)
    return Launch(max(1, min(64, 2048 // block)), block, False)


@triton.jit
def locate_rows(block, num_tokens, H: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(tokens, heads) of a program's rows; tokens from num_tokens on are none."""
    lanes = tl.arange(0, ROWS)
    if TRANSPOSED:
        return block // H * ROWS + lanes, block % H + 0 * lanes
    else:
        rows = block * ROWS + lanes
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
    TRANSPOSED: tl.constexpr,
):
    """Writes x [ROWS, BLOCK], already of the cache's dtype, into the slots that are not negative."""
    if TRANSPOSED:
        ROWS: tl.constexpr = x.shape[0]
        lanes = tl.arange(0, ROWS)
        column = columns.to(tl.int64)[:, None]
        turned = tl.trans(x)
        first = tl.min(slot, axis=0)
        run = tl.sum((slot == first + lanes).to(tl.int32), axis=0) == ROWS
        head = tl.min(heads, axis=0).to(tl.int64) * cache_head
        if run & (first >= 0) & (first % ROWS == 0):
            start = tl.multiple_of(first % PAGE // ROWS * ROWS, ROWS)
            base = cache_ptr + (first // PAGE).to(tl.int64) * cache_page + head + start * cache_slot
            tl.store(base + column * cache_column + lanes[None, :] * cache_slot, turned, column < D)
        else:
            page = (slot // PAGE).to(tl.int64)[None, :]
            offset = (slot % PAGE).to(tl.int64)[None, :]
            target = cache_ptr + page * cache_page + head + offset * cache_slot + column * cache_column
            tl.store(target, turned, (slot >= 0)[None, :] & (column < D))
    else:
        page = (slot // PAGE).to(tl.int64)[:, None]
        offset = (slot % PAGE).to(tl.int64)[:, None]
        target = cache_ptr + page * cache_page + offset * cache_slot + heads.to(tl.int64)[:, None] * cache_head
        tl.store(target + columns[None, :], x, (slot >= 0)[:, None] & (columns < D)[None, :])


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
    scale_page,
    scale_slot,
    scale_head,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A program's rows from reading to storing."""
    tokens, heads = locate_rows(block, num_tokens, H, ROWS, TRANSPOSED)
    slot = tl.load(slots_ptr + tokens, tokens < num_tokens, other=-1)
    columns = tl.arange(0, BLOCK)
    rows = x_ptr + tokens.to(tl.int64)[:, None] * x_token + heads.to(tl.int64)[:, None] * x_head
    x = tl.load(rows + columns[None, :], (slot >= 0)[:, None] & (columns < D)[None, :], other=0.0)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    x = quantise_rows(x, scale_ptr, slot, heads, scale_page, scale_slot, scale_head, SCALING, PAGE, dtype)
    store_rows(x, cache_ptr, slot, heads, columns, cache_page, cache_slot, cache_head, cache_column, D, PAGE, TRANSPOSED)


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
    K_TRANSPOSED: tl.constexpr,
    V_ROWS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    block = tl.program_id(0)
    if block < k_blocks:
        store_part(
            block,
            k_ptr,
            k_cache_ptr,
            slots_ptr,
            k_scale_ptr,
            num_tokens,
            k_token,
            k_head,
            k_page,
            k_slot,
            k_cache_head,
            k_column,
            k_scale_page,
            k_scale_slot,
            k_scale_head,
            H,
            D,
            PAGE,
            K_SCALING,
            K_ROWS,
            K_BLOCK,
            K_TRANSPOSED,
        )
    else:
        store_part(
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
            0,
            0,
            v_scale_head,
            H,
            DV,
            PAGE,
            V_SCALING,
            V_ROWS,
            V_BLOCK,
            V_TRANSPOSED,
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
    k_config = configure(D, page_size, k_cache.stride(3) != 1 and D > 1)
    v_config = configure(Dv, page_size, v_cache.stride(3) != 1 and Dv > 1)
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
        *k_cache.stride(),
        *v_cache.stride(),
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
        K_TRANSPOSED=k_config.transposed,
        V_ROWS=v_config.rows,
        V_BLOCK=v_config.block,
        V_TRANSPOSED=v_config.transposed,
        num_warps=8 if v_config.transposed else 4,
    )
