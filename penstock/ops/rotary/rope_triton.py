"""One launch for queries and keys: the first programs take rows (token, query head), the others rows (token, key head)."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A program takes `rows` (token, head) rows of `half` pairs and `rest` unrotated columns, with num_warps warps."""

    rows: int
    half: int
    rest: int
    num_warps: int = 4


def configure(D: int, half: int, copies: bool) -> Launch:
    """1,024 pairs a program, 8 a thread: one 16-byte load of each partner in bfloat16."""
    block = triton.next_power_of_2(half)
    rest = triton.next_power_of_2(D - 2 * half) if copies and 2 * half < D else 0
    return Launch(max(1, min(64, 1024 // max(block, rest // 2))), block, rest)


@triton.jit
def _rotate_rows(
    block,
    out_ptr,
    x_ptr,
    cos_sin_ptr,
    positions_ptr,
    num_tokens,
    table_stride,
    out_token,
    out_head,
    x_token,
    x_head,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    rows = block * ROWS + tl.arange(0, ROWS)
    tokens = rows // H
    live = tokens < num_tokens
    position = tl.load(positions_ptr + tokens, live, other=-1)
    tokens = tokens.to(tl.int64)[:, None]
    heads = (rows % H).to(tl.int64)[:, None]
    x_rows = x_ptr + tokens * x_token + heads * x_head
    out_rows = out_ptr + tokens * out_token + heads * out_head
    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    # A padding row turns by no angle.
    turned = (position >= 0)[:, None] & (pairs < HALF)
    table = cos_sin_ptr + position.to(tl.int64)[:, None] * table_stride + pairs
    cos = tl.load(table, turned, other=1.0).to(tl.float32)
    sin = tl.load(table + HALF, turned, other=0.0).to(tl.float32)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        mask = live[:, None] & (columns < 2 * HALF)
        x = tl.load(x_rows + columns, mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, HALF_BLOCK, 2)))
        both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * HALF_BLOCK))
        tl.store(out_rows + columns, both.to(out_ptr.dtype.element_ty), mask)
    else:
        mask = live[:, None] & (pairs < HALF)
        a = tl.load(x_rows + pairs, mask, other=0.0).to(tl.float32)
        b = tl.load(x_rows + HALF + pairs, mask, other=0.0).to(tl.float32)
        tl.store(out_rows + pairs, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask)
        tl.store(out_rows + HALF + pairs, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask)
    if REST_BLOCK > 0:
        columns = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        mask = live[:, None] & (columns < D)
        tl.store(out_rows + columns, tl.load(x_rows + columns, mask, other=0.0), mask)


@triton.jit
def _rope_kernel(
    out_q_ptr,
    out_k_ptr,
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    positions_ptr,
    num_tokens,
    table_stride,
    out_q_token,
    out_q_head,
    out_k_token,
    out_k_head,
    q_token,
    q_head,
    k_token,
    k_head,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    q_blocks = tl.cdiv(num_tokens * HQ, ROWS)
    if block < q_blocks:
        _rotate_rows(
            block,
            out_q_ptr,
            q_ptr,
            cos_sin_ptr,
            positions_ptr,
            num_tokens,
            table_stride,
            out_q_token,
            out_q_head,
            q_token,
            q_head,
            HQ,
            D,
            HALF,
            INTERLEAVED,
            ROWS,
            HALF_BLOCK,
            REST_BLOCK,
        )
    else:
        _rotate_rows(
            block - q_blocks,
            out_k_ptr,
            k_ptr,
            cos_sin_ptr,
            positions_ptr,
            num_tokens,
            table_stride,
            out_k_token,
            out_k_head,
            k_token,
            k_head,
            HKV,
            D,
            HALF,
            INTERLEAVED,
            ROWS,
            HALF_BLOCK,
            REST_BLOCK,
        )


def launch(out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    """Launches over all (token, head) rows of both; a program writes only the rows that it has read."""
    T, Hq, D = q.shape
    Hkv, half = k.shape[1], cos_sin.shape[1] // 2
    if T * (Hq + Hkv) * D == 0:
        return
    config = configure(D, half, copies=out_q is not q or out_k is not k)
    tensors = (out_q, out_k, q, k)
    _rope_kernel[(triton.cdiv(T * Hq, config.rows) + triton.cdiv(T * Hkv, config.rows),)](
        *tensors,
        cos_sin,
        positions,
        T,
        cos_sin.stride(0),
        *[stride for tensor in tensors for stride in tensor.stride()[:2]],
        HQ=max(Hq, 1),
        HKV=max(Hkv, 1),
        D=D,
        HALF=half,
        INTERLEAVED=interleaved,
        ROWS=config.rows,
        HALF_BLOCK=config.half,
        REST_BLOCK=config.rest,
        num_warps=config.num_warps,
    )
