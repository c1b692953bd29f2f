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
    middle_stride,
    inner_stride,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = pairs_ptr + tl.program_id(0).to(tl.int64) * pairs_row
    source = tl.load(pair).to(tl.int64)
    destination = tl.load(pair + pairs_column).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    outer, rest = index // (MIDDLE * INNER), index % (MIDDLE * INNER)
    place = outer.to(tl.int64) * outer_stride + (rest // INNER).to(tl.int64) * middle_stride
    place += (rest % INNER).to(tl.int64) * inner_stride
    mask = (index < page) & (source >= 0) & (destination >= 0)
    tl.store(cache_ptr + destination * cache_page + place, tl.load(cache_ptr + source * cache_page + place, mask), mask)


def fold_page(cache: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of a page's dimensions, the slowest first, neighbours that are one run folded together; always three."""
    folded: list[tuple[int, int]] = []
    dimensions = zip(cache.shape[1:], cache.stride()[1:], strict=True)
    for size, stride in sorted((pair for pair in dimensions if pair[0] > 1), key=lambda pair: -pair[1]):
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    return [(1, 0)] * (3 - len(folded)) + folded


def launch(cache: Tensor, pairs: Tensor) -> None:
    """Launches over pairs and stretches of a page."""
    page = cache[0].numel() if len(cache) else 0
    if page * len(pairs) == 0:
        return
    if cache.element_size() == 1:
        cache = cache.view(torch.uint8)
    (_, outer_stride), (middle, middle_stride), (inner, inner_stride) = fold_page(cache)
    config = configure(page)
    _copy_kernel[(len(pairs), triton.cdiv(page, config.block))](
        cache,
        pairs,
        *pairs.stride(),
        page,
        cache.stride(0),
        outer_stride,
        middle_stride,
        inner_stride,
        MIDDLE=middle,
        INNER=inner,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
