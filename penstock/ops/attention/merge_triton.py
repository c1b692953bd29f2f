"""Merging of partial attention results: a program owns some heads of one token and walks the parts once."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(
    out_ptr,
    lse_ptr,
    outs_ptr,
    lses_ptr,
    n,
    out_token,
    out_head,
    outs_part,
    outs_token,
    outs_head,
    lses_part,
    lses_token,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = heads < HEADS
    columns = tl.arange(0, BLOCK_D)[None, :]
    whole = inside[:, None] & (columns < D)
    outs_at = outs_ptr + token * outs_token + heads[:, None] * outs_head + columns
    lses_at = lses_ptr + token * lses_token + heads
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)
    for _ in tl.range(0, n):
        lse = tl.load(lses_at, inside, other=float("-inf"))
        seen = lse > float("-inf")
        m_new = tl.maximum(m, lse)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - base)
        weight = tl.exp(lse - base)
        x = tl.load(outs_at, whole & seen[:, None], other=0.0).to(tl.float32)
        acc = acc * alpha[:, None] + weight[:, None] * x
        l = l * alpha + weight
        m = m_new
        outs_at += outs_part
        lses_at += lses_part
    dead = m == float("-inf")
    l = tl.where(dead, 1.0, l)
    out_at = out_ptr + token * out_token + heads[:, None] * out_head + columns
    tl.store(out_at, (acc / l[:, None]).to(out_ptr.dtype.element_ty), whole)
    tl.store(lse_ptr + token * HEADS + heads, tl.where(dead, float("-inf"), m + tl.log(l)), inside)


def launch(out: Tensor, out_lse: Tensor, outs: Tensor, lses: Tensor) -> None:
    """Launches over tokens and blocks of heads."""
    n, T, Hq, D = outs.shape
    if T == 0 or Hq == 0:
        return
    block_d = triton.next_power_of_2(D)
    block_h = max(1, min(triton.next_power_of_2(Hq), 2048 // block_d))
    _merge_kernel[(T, triton.cdiv(Hq, block_h))](
        out,
        out_lse,
        outs,
        lses,
        n,
        *out.stride()[:2],
        *outs.stride()[:3],
        *lses.stride()[:2],
        HEADS=Hq,
        BLOCK_H=block_h,
        D=D,
        BLOCK_D=block_d,
        num_warps=4,
    )
