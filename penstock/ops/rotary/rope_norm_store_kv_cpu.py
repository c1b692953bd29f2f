"""The CPU path of rope_norm_store_kv: q and k side by side in one float32 buffer, then the paths of the separate operators."""

import torch
from torch import Tensor, split_with_sizes

from penstock.core.formats import FP8_TOKEN
from penstock.ops.kvcache.store_kv_cpu import store, store_values
from penstock.ops.norm.rms_norm_cpu import normalise
from penstock.ops.quantization.hadamard import hadamard as transform
from penstock.ops.quantization.quantize import quantize
from penstock.ops.rotary.rope_cpu import rotate


def run(
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
    """Writes q, and k and v where a slot is not negative."""
    tokens, D = qkv.shape[0], k_cache.shape[3]
    if tokens == 0:
        return
    num_k = k_cache.shape[2]
    num_q = qkv.shape[1] // D - 2 * num_k
    heads = qkv.unflatten(1, (-1, D))
    q, k, v = split_with_sizes(heads, (num_q, num_k, num_k), 1)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if q_norm is k_norm is None and not hadamard and format is None:
        key = torch.empty_like(k, memory_format=torch.contiguous_format)
        rotate(out, key, q, k, cos_sin, positions, interleaved)
        store_values(key, k_cache, v, v_cache, slots)
        return
    both = torch.empty(tokens, num_q + num_k, D, dtype=wide)
    query, key = parts = split_with_sizes(both, (num_q, num_k), 1)
    for part, x, weight in zip(parts, (q, k), (q_norm, k_norm), strict=True):
        if weight is not None and norm_first:
            normalise(part, x, weight.to(wide), eps, weight_offset)
        else:
            part.copy_(x)
    rotate(query, key, query, key, cos_sin, positions, interleaved)
    if not norm_first:
        for part, weight in zip(parts, (q_norm, k_norm), strict=True):
            if weight is not None:
                normalise(part, part, weight.to(wide), eps, weight_offset)
    if hadamard:
        transform(both, out=both, impl="cpu")
    if format is None:
        out.copy_(query)
        store_values(key.to(qkv.dtype), k_cache, v, v_cache, slots)
        return
    quantize(query, format=FP8_TOKEN, out=(out, out_scale), impl="cpu")
    store(key, v, k_cache, v_cache, slots, k_scale, v_scale)
