"""Device functions that the attention kernels share: softcap, one step of the online softmax, its end, addresses of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


def page_kind(page_size: int) -> str:
    """What a table of launch configs tells apart: no pages, pages within a block of keys, or a block within a page."""
    return "none" if page_size == 0 else "small" if page_size < 64 else "large"


Scales = tuple[tuple[Tensor | None, ...], tuple[int, ...]]
# (q, k, v scales), (q token, q head, k page, k slot, k head, v head strides)
NO_SCALES: Scales = (None, None, None), (0,) * 6


def fp8_scales(q: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> Scales:
    """The scales of FP8 values with their strides, as in NO_SCALES; 1 where there is none."""

    def given(scale: Tensor | None) -> Tensor:
        return q.new_ones(1, dtype=torch.float32) if scale is None else scale

    def by_head(scale: Tensor) -> int:
        return 0 if scale.shape[0] == 1 else scale.stride(0)

    q_scale, k_scale, v_scale = given(q_scale), given(k_scale), given(v_scale)
    q_strides = q_scale.stride() if q_scale.dim() == 2 else (0, by_head(q_scale))
    k_strides = k_scale.stride() if k_scale.dim() == 3 else (0, 0, by_head(k_scale))
    return (q_scale, k_scale, v_scale), (*q_strides, *k_strides, by_head(v_scale))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|); near zero, where that cancels, the series."""
    square = x * x
    series = x * (
        1.0 + square * (-0.33333333333 + square * (0.13333333333 + square * (-0.05396825397 + square * 0.02186948854)))
    )
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    whole = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.04, series, tl.where(x < 0, -whole, whole))


@triton.jit
def rescale(s, m, score_scale, MASKED: tl.constexpr, LIFT: tl.constexpr):
    """(weights of the scores s, factor of what was summed before, new maximum), in base 2 against the running maximum.

    score_scale: of each row. MASKED: a row may have seen nothing yet; -inf - -inf is kept away. The weights are 2^LIFT times
    themselves, which the sum of weights cancels: FP8 stores them with LIFT = 8.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * score_scale)
    base = m_new
    if MASKED:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * score_scale[:, None] - (base - LIFT)[:, None])
    alpha = tl.exp2(m - base)
    return p, alpha, m_new


@triton.jit
def finish(acc, m, l, sink, HAS_SINKS: tl.constexpr):
    """(acc / l, log2 of the denominator); zero and -inf for rows that saw no key. sink is in base 2."""
    dead = m == float("-inf")
    if HAS_SINKS:
        highest = tl.maximum(m, sink)
        shrink = tl.exp2(m - highest)
        l = tl.where(dead, 0.0, l * shrink + tl.exp2(sink - highest))
        acc = acc * shrink[:, None]
        m = tl.where(dead, m, highest)
    l = tl.where(dead, 1.0, l)
    # One division a row: a thread holds up to 128 values of acc.
    acc = acc * (1.0 / l)[:, None]
    lse = tl.where(dead, float("-inf"), m + tl.log2(l))
    return acc, lse


@triton.jit
def pages_of(table, block, keys_below, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a block of keys, or the page of each of its keys where pages are smaller; 64-bit.

    Loops look up the pages of the next block and carry them: a look-up in the same step as the loads that need it would
    take half of the pipeline's stages.
    """
    if PAGE_SIZE >= BLOCK_N:
        return tl.load(table + block * BLOCK_N // PAGE_SIZE, block * BLOCK_N < keys_below, other=0).to(tl.int64)
    else:
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        return tl.load(table + keys // PAGE_SIZE, keys < keys_below, other=0).to(tl.int64)


@triton.jit
def rows_at(base, pages, block, page_stride, slot_stride, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses [BLOCK_N, 1] of the rows of a block of keys; PAGE_SIZE 0 for keys that are packed."""
    steps = tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        start = tl.full([], BLOCK_N, tl.int64) * block
        return base + start * slot_stride + (steps * slot_stride)[:, None]
    elif PAGE_SIZE >= BLOCK_N:
        slot = block * BLOCK_N % PAGE_SIZE
        return base + pages * page_stride + slot * slot_stride + (steps * slot_stride)[:, None]
    else:
        slots = (block * BLOCK_N + steps) % PAGE_SIZE
        return base + (pages * page_stride + slots * slot_stride)[:, None]
