"""One launch: the first programs take rows (token, head) of q, the next those of k, the last those of v.

A row is read once from memory and stays in registers to its end. In a rotation by halves the partner of each dimension is read
a second time, out of the first-level cache: exchanging it between threads would cost as much.
"""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.formats_triton import encode, largest, scale_of
from penstock.ops.kvcache.store_kv_triton import configure as configure_rows
from penstock.ops.kvcache.store_kv_triton import (
    configure_values,
    locate_rows,
    quantise_rows,
    scaling_of,
    store_rows,
    store_values,
)
from penstock.ops.quantization.hadamard_triton import transform_rows


@triton.jit
def _scaled(x, norm_ptr, columns, D, eps, weight_offset):
    weight = tl.load(norm_ptr + columns, columns < D, other=0.0).to(tl.float32) + weight_offset
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight[None, :]


@triton.jit
def _prepare(
    x_rows,
    norm_ptr,
    cos_sin_ptr,
    position,
    live,
    table_stride,
    eps,
    weight_offset,
    NORM: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows normed, rotated and transformed, float32 [ROWS, BLOCK]; zero where a row is not live or a column beyond D."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_rows[:, None] + columns[None, :], live[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    if HALF > 0:
        rotated = (live & (position >= 0))[:, None] & (columns < 2 * HALF)[None, :]
        table = cos_sin_ptr + tl.maximum(position, 0).to(tl.int64)[:, None] * table_stride
        if INTERLEAVED:
            pair = columns // 2
            sign = tl.where(columns % 2 == 0, -1.0, 1.0)
        else:
            pair = columns % HALF
            sign = tl.where(columns < HALF, -1.0, 1.0)
            other = (columns + HALF) % (2 * HALF)
            partner = tl.load(x_rows[:, None] + other[None, :], rotated, other=0.0).to(tl.float32)
        cos = tl.load(table + pair[None, :], rotated, other=1.0).to(tl.float32)
        sin = tl.load(table + HALF + pair[None, :], rotated, other=0.0).to(tl.float32) * sign[None, :]
        if NORM == "first":
            if not INTERLEAVED:
                weight = tl.load(norm_ptr + other, columns < 2 * HALF, other=0.0).to(tl.float32) + weight_offset
                partner = partner * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight[None, :]
            x = _scaled(x, norm_ptr, columns, D, eps, weight_offset)
        if INTERLEAVED:
            even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
            partner = tl.reshape(tl.join(odd, even), (ROWS, BLOCK))
            # Beyond R there is no partner, and what stands there may be infinite.
            partner = tl.where(rotated, partner, 0.0)
        x = x * cos + partner * sin
    elif NORM == "first":
        x = _scaled(x, norm_ptr, columns, D, eps, weight_offset)
    if NORM == "last":
        x = _scaled(x, norm_ptr, columns, D, eps, weight_offset)
    if ROUNDS > 0:
        x = transform_rows(x, ROWS, BLOCK, ROUNDS) * tl.rsqrt(D * 1.0)
    return x


@triton.jit
def _rope_norm_store_kv_kernel(
    out_ptr,
    out_scale_ptr,
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_tokens,
    q_blocks,
    k_blocks,
    qkv_token,
    table_stride,
    out_token,
    out_head,
    scale_token,
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
    eps,
    weight_offset,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDS: tl.constexpr,
    K_SCALING: tl.constexpr,
    V_SCALING: tl.constexpr,
    Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr,
    V_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    if block < q_blocks:
        tokens, heads = locate_rows(block, HQ, Q_ROWS)
        live = tokens < num_tokens
        position = tl.load(positions_ptr + tokens, live, other=-1)
        tokens = tokens.to(tl.int64)
        x_rows = qkv_ptr + tokens * qkv_token + heads * D
        x = _prepare(
            x_rows,
            q_norm_ptr,
            cos_sin_ptr,
            position,
            live,
            table_stride,
            eps,
            weight_offset,
            Q_NORM,
            D,
            HALF,
            INTERLEAVED,
            ROUNDS,
            Q_ROWS,
            BLOCK,
        )
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        if K_SCALING == "none":
            q = x.to(dtype)
        else:
            scale = scale_of(largest(x, 1), 448.0)
            tl.store(out_scale_ptr + tokens * scale_token + heads, scale, live)
            q = encode(x, scale[:, None], dtype)
        place = out_ptr + (tokens * out_token + heads * out_head)[:, None] + columns[None, :]
        tl.store(place, q, live[:, None] & (columns < D)[None, :])
    elif block < q_blocks + k_blocks:
        tokens, heads = locate_rows(block - q_blocks, HKV, K_ROWS)
        slot = tl.load(slots_ptr + tokens, tokens < num_tokens, other=-1)
        position = tl.load(positions_ptr + tokens, tokens < num_tokens, other=-1)
        x_rows = qkv_ptr + tokens.to(tl.int64) * qkv_token + (HQ + heads) * D
        x = _prepare(
            x_rows,
            k_norm_ptr,
            cos_sin_ptr,
            position,
            slot >= 0,
            table_stride,
            eps,
            weight_offset,
            K_NORM,
            D,
            HALF,
            INTERLEAVED,
            ROUNDS,
            K_ROWS,
            BLOCK,
        )
        k_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        k = quantise_rows(x, k_scale_ptr, slot, heads, k_scale_page, k_scale_slot, k_scale_head, K_SCALING, PAGE, k_dtype)
        store_rows(k, k_cache_ptr, slot, heads, columns, k_page, k_slot, k_cache_head, k_column, D, PAGE)
    else:
        store_values(
            block - q_blocks - k_blocks,
            qkv_ptr + (HQ + HKV) * D,
            v_cache_ptr,
            slots_ptr,
            v_scale_ptr,
            num_tokens,
            qkv_token,
            D,
            v_page,
            v_slot,
            v_cache_head,
            v_column,
            v_scale_head,
            HKV,
            D,
            PAGE,
            V_SCALING,
            V_ROWS,
            BLOCK,
            V_RUN,
        )


def launch(
    out: Tensor,
    out_scale: Tensor | None,
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    eps: float,
    weight_offset: float,
    norm_first: bool,
    interleaved: bool,
    hadamard: bool,
    format: str | None,
) -> None:
    """Launches over all (token, head) rows of q, k and v."""
    T = qkv.shape[0]
    _, page_size, Hkv, D = k_cache.shape
    if T * qkv.shape[1] == 0:
        return
    Hq = qkv.shape[1] // D - 2 * Hkv
    plain, values = configure_rows(D), configure_values(T, Hkv, v_cache)
    k_scaling, k_scale_strides = scaling_of(k_scale)
    v_scaling, v_scale_strides = scaling_of(v_scale)
    when = "first" if norm_first else "last"
    q_blocks, k_blocks, v_blocks = plain.programs(T, Hq), plain.programs(T, Hkv), values.programs(T, Hkv)
    _rope_norm_store_kv_kernel[(q_blocks + k_blocks + v_blocks,)](
        out,
        out_scale,
        qkv,
        cos_sin,
        positions,
        slots,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        k_scale,
        v_scale,
        T,
        q_blocks,
        k_blocks,
        qkv.stride(0),
        cos_sin.stride(0),
        *out.stride()[:2],
        0 if out_scale is None else out_scale.stride(0),
        *k_cache.stride()[:3],
        k_cache.stride(3) if D > 1 else 1,
        *v_cache.stride()[:3],
        v_cache.stride(3) if D > 1 else 1,
        *k_scale_strides,
        v_scale_strides[2],
        eps,
        weight_offset,
        HQ=Hq,
        HKV=Hkv,
        D=D,
        HALF=cos_sin.shape[1] // 2,
        PAGE=page_size,
        Q_NORM="none" if q_norm is None else when,
        K_NORM="none" if k_norm is None else when,
        INTERLEAVED=interleaved,
        ROUNDS=D.bit_length() - 1 if hadamard else 0,
        K_SCALING=k_scaling,
        V_SCALING=v_scaling,
        Q_ROWS=plain.rows,
        K_ROWS=plain.rows,
        V_ROWS=values.rows,
        V_RUN=values.run,
        BLOCK=plain.block,
    )
