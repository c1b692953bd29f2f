"""The CPU path of gather_kv: whole pages are taken at once, request by request, because requests are few and rows are many."""

import torch
from torch import Tensor


def gather(out: Tensor, cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor) -> None:
    """Copies each request's pages into its rows and zeroes what is left."""
    if cache.dtype is torch.float8_e4m3fn:
        # Taking rows exists for bytes, not for FP8.
        out, cache = out.view(torch.uint8), cache.view(torch.uint8)
    size, total = cache.shape[1], out.shape[0]
    starts = cu_seqlens.tolist()
    end = 0
    for request, length in enumerate(seqlens.tolist()):
        start = starts[request]
        length = max(min(length, starts[request + 1] - start, total - start), 0)
        if start > end:
            out[end:start].zero_()
        if length:
            pages = cache.index_select(0, page_table[request, : -(-length // size)])
            out[start : start + length].copy_(pages.flatten(0, 1)[:length])
        end = start + length
    if end < total:
        out[end:].zero_()
