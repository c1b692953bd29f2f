"""The CPU path of store_kv: slots are read on the host, so that a decoding step is a plain copy of one row."""

import torch
from torch import Tensor

from penstock.core.formats import FP8_TENSOR, FP8_TOKEN


def store(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Writes the rows whose slot is not negative."""
    if k_scale is not None and v_scale is not None:
        if k_scale.dim() > 1:
            scale = FP8_TOKEN.dynamic_scale(k.float())
            store_scales(scale, k_scale, slots)
        else:
            scale = k_scale
        k, v = _scaled(k, scale), _scaled(v, v_scale)
    store_values(k, k_cache, v, v_cache, slots)


def store_scales(scale: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes scales [T, Hkv] into their slots of [P, S, Hkv]."""
    kept = (slots >= 0).nonzero().squeeze(1)
    index, size = slots[kept].long(), cache.shape[1]
    cache.index_put_((index // size, index % size), scale[kept])


def store_values(k: Tensor, k_cache: Tensor, v: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes rows that are already scaled."""
    numbers = slots.tolist()
    if len(numbers) == 1:
        if numbers[0] >= 0:
            _store_row(k, k_cache, numbers[0])
            _store_row(v, v_cache, numbers[0])
        return
    if not numbers:
        return
    if min(numbers) < 0:
        kept = (slots >= 0).nonzero().squeeze(1)
        slots, k, v = slots[kept], k[kept], v[kept]
    index = slots.long()
    _store_rows(k, k_cache, index)
    _store_rows(v, v_cache, index)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    # A 16-bit x divided by a float32 scale is a float32 quotient; writing it to the cache rounds it.
    return (x / scale.unsqueeze(-1)).clamp_(-FP8_TENSOR.largest, FP8_TENSOR.largest)


def _store_row(x: Tensor, cache: Tensor, slot: int) -> None:
    page, offset = divmod(slot, cache.shape[1])
    page_stride, slot_stride, *rest = cache.stride()
    start = cache.storage_offset() + page * page_stride + offset * slot_stride
    cache.as_strided(x.shape, (0, *rest), start).copy_(x)


def _store_rows(x: Tensor, cache: Tensor, index: Tensor) -> None:
    if cache.dtype is torch.float8_e4m3fn:
        # Indexed writes exist for bytes, not for FP8.
        x, cache = x.to(cache.dtype).view(torch.uint8), cache.view(torch.uint8)
    size = cache.shape[1]
    if cache.stride(0) == size * cache.stride(1):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, index, x)
    else:
        cache.index_put_((index // size, index % size), x)
