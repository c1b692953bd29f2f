"""A program copies one stretch of one page; a page that is dense in memory is copied as one run, whatever its layout."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A program takes `block` values of a page, with num_warps warps."""

    block: int
    num_warps: int = 4


def configure(page: int) -> Launch:
    """At most 2,048 values a program, 16 a thread."""
    return Launch(min(triton.next_power_of_2(page), 2048))


@triton.jit
def _copy_kernel(
    cache_ptr,
    pairs_ptr,
    pairs_row,
    pairs_column,
    page,
    cache_page,
    outer_stride,
    inner_stride,
    INNER: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = pairs_ptr + tl.program_id(0).to(tl.int64) * pairs_row
    source = tl.load(pair).to(tl.int64)
    destination = tl.load(pair + pairs_column).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    run = index // RUN
    place = (run // INNER).to(tl.int64) * outer_stride + (run % INNER).to(tl.int64) * inner_stride + index % RUN
    mask = (index < page) & (source >= 0) & (destination >= 0)
    tl.store(cache_ptr + destination * cache_page + place, tl.load(cache_ptr + source * cache_page + place, mask), mask)


def launch(cache: Tensor, pairs: Tensor) -> None:
    """Launches over pairs and stretches of a page."""
    S, H, D = cache.shape[1:]
    page = S * H * D
    if page * len(pairs) == 0:
        return
    if cache.element_size() == 1:
        cache = cache.view(torch.uint8)
    # The slower varying of slots and heads comes first, so that a dense page folds into one run.
    (outer_stride, _), (inner_stride, inner) = sorted([(cache.stride(1), S), (cache.stride(2), H)], reverse=True)
    run = D
    if inner_stride == run or inner == 1:
        run, inner = run * inner, 1
        if outer_stride == run or page == run:
            run = page
    config = configure(page)
    _copy_kernel[(len(pairs), triton.cdiv(page, config.block))](
        cache,
        pairs,
        *pairs.stride(),
        page,
        cache.stride(0),
        outer_stride,
        inner_stride,
        INNER=inner,
        RUN=run,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
