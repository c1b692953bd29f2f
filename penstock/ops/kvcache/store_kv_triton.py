"""One launch for keys and values: the first programs take rows (token, head) of k, the others those of v."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` (token, head) rows of k or of v, with num_warps warps."""

    rows: int
    k_block: int
    v_block: int
    num_warps: int = 4


def configure(D: int, Dv: int) -> Launch:
    """2,048 values a program, 16 a thread: two 16-byte loads in bfloat16, one 16-byte store in FP8."""
    k_block, v_block = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    return Launch(max(1, min(64, 2048 // max(k_block, v_block))), k_block, v_block)


@triton.jit
def _divide(x, divisor):
    """x / divisor rounded to nearest: one division for all, each quotient corrected by its remainder."""
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = x * reciprocal
    corrected = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    # Where FP8 saturates or rounds to zero the quotient will do, and the remainder may be no number, or lose the sign of zero.
    magnitude = tl.abs(quotient)
    return tl.where((magnitude > 0.000244140625) & (magnitude < 512.0), corrected, quotient)


@triton.jit
def _store_rows(
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
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    QUANTISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = block * ROWS + tl.arange(0, ROWS)
    tokens = rows // H
    heads = (rows % H).to(tl.int64)[:, None]
    slot = tl.load(slots_ptr + tokens, tokens < num_tokens, other=-1)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (slot >= 0)[:, None] & (columns < D)
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * x_token + heads * x_head + columns, mask, other=0.0)
    if QUANTISE:
        # The conversion saturates: cvt.rn.satfinite.
        x = _divide(x.to(tl.float32), tl.load(scale_ptr))
    page = (slot // PAGE).to(tl.int64)[:, None]
    offset = (slot % PAGE).to(tl.int64)[:, None]
    target = cache_ptr + page * cache_page + offset * cache_slot + heads * cache_head + columns
    tl.store(target, x.to(cache_ptr.dtype.element_ty), mask)


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
    k_token,
    k_head,
    v_token,
    v_head,
    k_page,
    k_slot,
    k_cache_head,
    v_page,
    v_slot,
    v_cache_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    QUANTISE: tl.constexpr,
    ROWS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    num_blocks = tl.cdiv(num_tokens * H, ROWS)
    if block < num_blocks:
        _store_rows(
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
            H,
            D,
            PAGE,
            QUANTISE,
            ROWS,
            K_BLOCK,
        )
    else:
        _store_rows(
            block - num_blocks,
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
            H,
            DV,
            PAGE,
            QUANTISE,
            ROWS,
            V_BLOCK,
        )


def launch(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Launches over all (token, head) rows of both; scales are given together or not at all."""
    T, H, D = k.shape
    Dv = v.shape[2]
    if T * H == 0:
        return
    config = configure(D, Dv)
    _store_kv_kernel[(2 * triton.cdiv(T * H, config.rows),)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k_scale,
        v_scale,
        T,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        H=H,
        D=D,
        DV=Dv,
        PAGE=k_cache.shape[1],
        QUANTISE=k_scale is not None,
        ROWS=config.rows,
        K_BLOCK=config.k_block,
        V_BLOCK=config.v_block,
        num_warps=config.num_warps,
    )
