"""The CPU path of store_kv: slots are read on the host, so that a decoding step is a plain copy of one row."""

import torch
from torch import Tensor

from penstock.core.formats import FP8_TENSOR

# Up to this many rows plain copies cost less than one indexed write.
FEW = 2


def store(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Writes the rows whose slot is not negative."""
    if k_scale is not None and v_scale is not None:
        k, v = _quantised(k, k_scale, k_cache.dtype), _quantised(v, v_scale, v_cache.dtype)
        if k_cache.element_size() == 1:
            # Indexed writes exist for bytes, not for FP8.
            k, v, k_cache, v_cache = (tensor.view(torch.uint8) for tensor in (k, v, k_cache, v_cache))
    size = k_cache.shape[1]
    if len(slots) <= FEW:
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page, offset = divmod(slot, size)
                k_cache[page, offset].copy_(k[token])
                v_cache[page, offset].copy_(v[token])
        return
    if slots.min() < 0:
        kept = (slots >= 0).nonzero().squeeze(1)
        slots, k, v = slots[kept], k[kept], v[kept]
    index = (slots // size, slots % size)
    k_cache.index_put_(index, k)
    v_cache.index_put_(index, v)


def _quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    return wide.clamp_(-FP8_TENSOR.largest, FP8_TENSOR.largest).to(dtype)
